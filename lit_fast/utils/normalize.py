"""Scale vectors to unit length."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # commands that need no device do not load JAX
    import jax

EPSILON = 1e-8

Array = TypeVar("Array", "jax.Array", np.ndarray)


def normalize(x: Array) -> Array:
    """Return `x / (|x| + 1e-8)` along the last axis in float32, of a JAX or NumPy array (big_vision, two_towers.py)."""
    x = x.astype(np.float32, copy=False)
    if isinstance(x, np.ndarray):
        return x / (np.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)
    import jax.numpy as jnp

    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)
