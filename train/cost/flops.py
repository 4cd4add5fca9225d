"""Model FLOPs of a step, for MFU, and the FLOPs of a traced program.

MFU counts the operations that the model needs, each once, over the chip's dense bfloat16 peak. What the program
works out again does not count: layers in the backward pass, and similarities in the second round of the softmax
loss and the three rounds that look for the hardest or easiest negatives.
"""

from __future__ import annotations

import math
from typing import Any

from lit_fast.models.text_tower import TextTower


def step_flops(
    model: TextTower, texts: int, images: int, image_head: bool = False, tokens: float | None = None
) -> float:
    """Forward and backward of the text tower and the loss; embeddings are look-ups and count nothing.

    Three times the forward products of the tower (attention in full). Of the loss the similarities of all pairs,
    whatever pairs are left out, and the gradient of the texts; that of the image embeddings only for an image
    head, which is itself applied once forward and once backward, as the features need no gradient.

    `tokens` are those of a caption that are worked on, on average; None: as many as the tower knows positions.
    """
    width, depth, mlp_dim, _ = model.shape
    length = tokens or model.max_length
    layer = length * (8 * width**2 + 4 * width * mlp_dim) + 4 * length**2 * width
    # Query, output and MLP for one position, keys and values for all: a MAP head, or the last layer of a tower
    # that needs it at one position only.
    one = 4 * width**2 + 4 * width * mlp_dim + 4 * length * width**2 + 4 * length * width
    single = model.pooling in ("last", "first")
    text = (depth - single) * layer + one * (single or model.pooling == "map")
    text += 2 * length * model.embedding_width * width
    if model.projected:
        text += 2 * width * model.out_dim
    pairs = 2 * texts * images * model.out_dim
    head = 2 * images * model.out_dim**2
    return 3.0 * texts * text + (3.0 * pairs + 2.0 * head if image_head else 2.0 * pairs)


def program_flops(program: Any) -> float:
    """Operations of all matrix products of a traced program (a jaxpr), with what is worked out again.

    What stands in a loop counts as often as it runs. Of branches the one with the most counts; where it depends on
    the platform, that of all platforms that are not named.
    """
    total = 0.0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        if equation.primitive.name == "cond":
            branches = [program_flops(branch.jaxpr) for branch in equation.params["branches"]]
            total += branches[-1] if equation.params.get("branches_platforms") else max(branches)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += equation.params.get("length", 1) * program_flops(inner)
    return total
