"""Model FLOPs of a step, for MFU, and executed FLOPs of a traced program.

Model FLOPs count each operation that the model requires once. Recomputation does not count: layers in the backward
pass, the second pass of the softmax loss over all pairs, the three passes that search the hardest or easiest
negatives.
"""

from __future__ import annotations

import math
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
        trained = 3.0 * images * flops_per_image(image.architecture, image.size)
        return trained + 3.0 * texts * text + 3.0 * pairs + 3.0 * head * image_head
    return 3.0 * texts * text + (3.0 * pairs + 2.0 * head if image_head else 2.0 * pairs)


def tower_flops(tower: FrozenTower) -> float:
    """Count the FLOPs of one image in the traced program of a vision tower."""
    size = tower.preprocess.size
    params = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tower.params)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    return program_flops(jax.make_jaxpr(tower.embed)(params, images).jaxpr)


def program_flops(program: Any) -> float:
    """Count the FLOPs of the matrix products and convolutions in a jaxpr, with recomputation.

    The body of a loop counts as often as it runs. Of several branches the most expensive one counts; of branches by
    platform, the default.
    """
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        if equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
            total += 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        if equation.primitive.name == "cond":
            branches = [program_flops(branch.jaxpr) for branch in equation.params["branches"]]
            total += branches[-1] if equation.params.get("branches_platforms") else max(branches)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += equation.params.get("length", 1) * program_flops(inner)
    return total
