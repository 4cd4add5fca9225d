"""Embeddings of unit length."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EPSILON = 1e-8


def normalize(x: jax.Array) -> jax.Array:
    """`x / (|x| + 1e-8)` along the last axis, in float32 (big_vision, two_towers.py)."""
    x = x.astype(jnp.float32)
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)
