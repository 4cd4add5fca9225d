"""Multi-head attention pooling, used by image and text towers alike."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.attention import MultiHeadDotProductAttention
from lit_fast.transformer import MlpBlock
from lit_fast.variants import Shape


class MAPHead(nn.Module):
    """A learned query looks at all tokens (big_vision, models/vit.py), or at several parts of them.

    x: [n, length, width] -> [n, k, width]; mask: bool, broadcastable to [n, heads, k, length], true where the
    query may look; without one, k is 1.
    """

    shape: Shape
    gelu: str
    epsilon: float
    dtype: Any
    dropout: float = 0.0  # of the tower; the head has none itself

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width, _, mlp_dim, heads = self.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32)
        x = x.astype(self.dtype)
        queries = 1 if mask is None else mask.shape[2]
        probe = jnp.tile(probe.astype(self.dtype), (x.shape[0], queries, 1))
        x = MultiHeadDotProductAttention(heads, self.dtype, self.dropout > 0)(probe, x, mask)
        y = nn.LayerNorm(epsilon=self.epsilon, use_fast_variance=False)(x)
        return x + MlpBlock(mlp_dim, self.gelu, self.dropout, self.dtype)(y, True)
