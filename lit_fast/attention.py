"""Multi-head attention with the parameter names and shapes of Flax's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.dense import Dense
from lit_fast.kept import kept


class MultiHeadDotProductAttention(nn.Module):
    """Every query looks at every key that the mask lets it see.

    queries: [n, q, width], keys: [n, k, width] -> [n, q, width]; mask: bool, broadcastable to
    [n, heads, q, k]. Scores and softmax are float32 whatever `dtype` is.

    Heads lie before positions in memory, and the weights are divided by their sum after the product
    with the values: on a CPU this takes a third of the time of `nn.MultiHeadDotProductAttention`.
    """

    heads: int
    dtype: Any = jnp.float32
    mapped: bool = False  # as of `Dense`

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = queries.shape[-1]
        size = width // self.heads
        dense = partial(
            Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), mapped=self.mapped
        )
        product = lambda name, x: kept(dense((self.heads, size), name=name)(x), "qkv")  # noqa: E731
        q = product("query", queries).swapaxes(1, 2) * size**-0.5
        k = product("key", keys).swapaxes(1, 2)
        v = product("value", keys).swapaxes(1, 2)
        scores = jnp.einsum("nhqd,nhkd->nhqk", q, k, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        weights = weights.astype(self.dtype)
        total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
        y = jnp.einsum("nhqk,nhkd->nhqd", weights, v, preferred_element_type=jnp.float32) / total
        y = kept(y.astype(self.dtype).swapaxes(1, 2), "attended")
        return dense((width,), contracted=2, name="out")(y)
