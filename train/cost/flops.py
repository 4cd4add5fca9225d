"""Model FLOPs of a step, for MFU, and executed FLOPs of a traced program.

Model FLOPs count each operation that the model requires once. Recomputation does not count: layers in the backward
pass, the second pass of the softmax loss over all pairs, the three passes that search the hardest or easiest
negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lit_fast.models.architecture import flops_per_image
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.text_tower import TextTower
from lit_fast.towers.interface import FrozenTower


def step_flops(
    model: TextTower,
    texts: int,
    images: int,
    image_head: bool = False,
    tokens: float | None = None,
    image: ImageTower | None = None,
) -> float:
    """Return the model FLOPs of the forward and backward pass of the trained towers and the loss.

    The tower counts three times its forward products, with full attention and without embedding look-ups. The loss
    counts the similarities of all pairs, excluded or not, and the gradient of the texts. An image head adds the
    gradient of the image embeddings and two products of its own; the features need no gradient.

    Args:
      tokens: mean number of tokens per caption that are computed; None: the maximum length.
      image: the image tower, if it is trained; it counts three times its forward products too.
    """
    width, depth, mlp_dim, _ = model.shape
    length = tokens or model.max_length
    layer = length * (8 * width**2 + 4 * width * mlp_dim) + 4 * length**2 * width
    # Queries, output and MLP at one position, keys and values at all: a MAP head, or the last layer of a tower that
    # pools one token.
    pooled_layer = 4 * width**2 + 4 * width * mlp_dim + 4 * length * width**2 + 4 * length * width
    pools_token = model.pooling in ("last", "first")
    text = (depth - pools_token) * layer + pooled_layer * (pools_token or model.pooling == "map")
    text += 2 * length * model.embedding_width * width
    if model.projected:
        text += 2 * width * model.out_dim
    pairs = 2 * texts * images * model.out_dim
    head = 2 * images * model.out_dim**2
    if image is not None:
        trained = 3.0 * images * flops_per_image(image.architecture, image.size, computed=True)
        return trained + 3.0 * texts * text + 3.0 * pairs + 3.0 * head * image_head
    return 3.0 * texts * text + (3.0 * pairs + 2.0 * head if image_head else 2.0 * pairs)


def tower_flops(tower: FrozenTower) -> float:
    """Count the FLOPs of one image in the traced program of a vision tower."""
    size = tower.preprocess.size
    params = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tower.params)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    return program_flops(jax.make_jaxpr(tower.embed)(params, images).jaxpr)


def _same_weight(dtype: Any, precision: str) -> float:
    return 1.0


def program_flops(program: Any, weight: Callable[[Any, str], float] = _same_weight) -> float:
    """Count the FLOPs of the matrix products and convolutions in a jaxpr, with recomputation.

    The body of a loop counts as often as it runs, that of a Pallas kernel once per step of its grid. Of several
    branches the most expensive one counts; of branches by platform, the default.

    Args:
      weight: factor of a product by its dtype and precision (DEFAULT, HIGH, HIGHEST), as `Chip.passes` has it.
    """
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval
            flops = 2.0 * equation.outvars[0].aval.size * math.prod(operand.shape[i] for i in contracted)
            total += flops * weight(operand.dtype, _precision(equation))
        if equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            flops = 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
            total += flops * weight(equation.invars[0].aval.dtype, _precision(equation))
        if equation.primitive.name == "cond":
            branches = [program_flops(branch.jaxpr, weight) for branch in equation.params["branches"]]
            total += branches[-1] if equation.params.get("branches_platforms") else max(branches)
        times = equation.params.get("length", 1)
        if equation.primitive.name == "pallas_call":
            times = math.prod(equation.params["grid_mapping"].grid)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * program_flops(inner, weight)
    return total


def _precision(equation: Any) -> str:
    """Return the precision of a product: DEFAULT, HIGH or HIGHEST."""
    precision = equation.params.get("precision")
    first = precision[0] if isinstance(precision, tuple) else precision
    return getattr(first, "name", "DEFAULT")
