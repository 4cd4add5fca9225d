"""Model FLOPs of a step and the peak of known chips, for MFU.

MFU counts the operations that the model needs, each once, over the chip's dense bfloat16 peak. What the program
works out again does not count: layers in the backward pass, and similarities in the second round of the softmax
loss and the three rounds that look for the hardest or easiest negatives.
"""

from __future__ import annotations

import jax

from lit_fast.text import TextTower

# Dense bfloat16 TFLOP/s of one device as JAX sees it, from the vendors' data sheets.
_PEAKS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s, or None where the chip is not known."""
    for name, tera in _PEAKS.items():
        if name in device.device_kind:
            return tera * 1e12
    return None


def step_flops(model: TextTower, texts: int, images: int, image_head: bool = False) -> float:
    """Forward and backward of the text tower and the loss; embeddings are look-ups and count nothing.

    Three times the forward products of the tower (attention in full). Of the loss the similarities of all pairs,
    whatever pairs are left out, and the gradient of the texts; that of the image embeddings only for an image
    head, which is itself applied once forward and once backward, as the features need no gradient.
    """
    width, depth, mlp_dim, _ = model.shape
    length = model.max_length
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
