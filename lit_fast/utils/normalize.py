"""Scale vectors to unit length."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

EPSILON = 1e-8

Array = TypeVar("Array", jax.Array, np.ndarray)


def normalize(x: Array) -> Array:
    """Return `x / (|x| + 1e-8)` along the last axis in float32, of a JAX or NumPy array (big_vision, two_towers.py)."""
    xp = jnp if isinstance(x, jax.Array) else np
    x = x.astype(np.float32, copy=False)
    return x / (xp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)
