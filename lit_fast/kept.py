"""What a layer may keep for the backward pass, by name."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: jax.Array, name: str) -> jax.Array:
    """`x`, which `jax.checkpoint_policies.save_only_these_names` knows by this name.

    bfloat16 is kept as its bits: XLA's CPU backend takes a layer's slice of a bfloat16 stack by converting the whole
    stack to float32, which triples the memory.
    """
    return _kept(x, name)


@kept.defjvp
def _(name: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _kept(primals[0], name), tangents[0]


def _kept(x: jax.Array, name: str) -> jax.Array:
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
