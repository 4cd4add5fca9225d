"""Sizes of transformer encoders by letter; imports no JAX."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of a transformer encoder."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


# big_vision, models/vit.py.
VARIANTS = {
    "mu": Shape(32, 1, 128, 2),
    "Ti": Shape(192, 12, 768, 3),
    "S": Shape(384, 12, 1536, 6),
    "M": Shape(512, 12, 2048, 8),
    "B": Shape(768, 12, 3072, 12),
    "L": Shape(1024, 24, 4096, 16),
    "So400m": Shape(1152, 27, 4304, 16),
    "H": Shape(1280, 32, 5120, 16),
    "g": Shape(1408, 40, 6144, 16),
    "g-opt": Shape(1536, 40, 6144, 16),
    "G": Shape(1664, 48, 8192, 16),
    "G-opt": Shape(1536, 48, 8192, 16),
    "e": Shape(1792, 56, 15360, 16),
}
