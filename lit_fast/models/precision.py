"""The dtype of matrix products where the configuration leaves it open, and how bfloat16 is stored."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.storage.machine import cpu_flags

# CPUs that multiply bfloat16: XLA converts it to float32 on all others, which takes longer than float32 alone. Measured
# in benchmarks/README.md, "bfloat16 on CPUs".
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")


def fast_dtype(platform: str = "", root: str = "/") -> str:
    """Return the faster dtype of matrix products, "bfloat16" or "float32".

    Args:
      platform: of the devices, "cpu", "gpu" or "tpu"; by default that of JAX.
      root: the directory that holds `proc`.
    """
    if (platform or jax.default_backend()) != "cpu":
        return "bfloat16"
    return "bfloat16" if cpu_flags(root) & set(BFLOAT16_FLAGS) else "float32"


def resolve_dtype(dtype: str, platform: str = "") -> str:
    """Return `dtype`, or the faster one for "auto"."""
    return fast_dtype(platform) if dtype == "auto" else dtype


def matmul_precision(dtype: Any) -> Any:
    """Return a context in which float32 products are float32 on accelerators too."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


# bfloat16 is stored as its bits: XLA's CPU backend slices a layer out of a bfloat16 array by converting the whole array
# to float32, which triples the memory.


def to_bits(a: jax.Array) -> jax.Array:
    """Return an array to keep in a stack of all layers."""
    return lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a


def from_bits(a: jax.Array) -> jax.Array:
    """Return the array of `to_bits`."""
    return lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a
