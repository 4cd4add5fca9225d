"""The text tower that is trained."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.map_head import MAPHead
from lit_fast.transformer import Encoder
from lit_fast.variants import Shape

GELU = "tanh"
EPSILON = 1e-6  # of every LayerNorm


class TextTower(nn.Module):
    """Token embedding, learned positions, encoder, pooling, head (big_vision, text_transformer.py).

    ids: int [n, length] -> float32 [n, out_dim], not normalised. `pooling` takes the "last"
    position or the "first", the "mean" or the "max" over all, or is a "map" head.

    `eos_id` as a number hides what follows the first end-of-sentence from attention and pooling; "last"
    is then the end-of-sentence itself, and the result does not depend on the length of the padding. None
    is the paper's rule: padding is ordinary tokens and is attended to, and the last position is whatever
    the caption is padded with.

    `embedding_width` K > 0 makes the table vocabulary x K, followed by a K x width projection without bias
    (paper, section 4.3). Rows of norm about 1 as in the plain table, times a projection of variance
    1 / width, give token embeddings of the plain table's scale: variance 1 / width.

    Without `projected` there is no head, and the width is `out_dim`.
    """

    shape: Shape
    vocab_size: int
    max_length: int
    out_dim: int
    pooling: str = "last"
    eos_id: int | None = None
    embedding_width: int = 0
    projected: bool = True
    dropout: float = 0.0
    keep: str = "everything"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, deterministic: bool = True) -> jax.Array:
        width = self.shape.width
        init = nn.initializers.normal(stddev=width**-0.5)
        if self.embedding_width:
            rows = nn.initializers.normal(stddev=self.embedding_width**-0.5)
            x = nn.Embed(self.vocab_size, self.embedding_width, embedding_init=rows)(ids)
            x = nn.Dense(
                width, use_bias=False, kernel_init=init, dtype=self.dtype, name="embedding_projection"
            )(x)
        else:
            x = nn.Embed(self.vocab_size, width, embedding_init=init)(ids)
        x = x + self.param("pos_embedding", init, (1, self.max_length, width), jnp.float32)
        x = nn.Dropout(self.dropout)(x, deterministic)
        seen = None
        if self.eos_id is not None:
            end = ids == self.eos_id
            seen = jnp.cumsum(end, axis=1) - end == 0  # up to and including the first end-of-sentence
        mask = None if seen is None else seen[:, None, None, :]
        encoder = Encoder(self.shape, GELU, EPSILON, self.dropout, self.keep, self.dtype)
        position = _position(ids, self.pooling, seen)
        x = encoder(x, mask, deterministic, position)
        if position is not None:
            x = x[:, 0]
        elif self.pooling == "map":
            x = MAPHead(self.shape, GELU, EPSILON, self.dtype)(x, mask)
        elif self.pooling == "max":
            x = x.max(axis=1, where=None if seen is None else seen[:, :, None], initial=-jnp.inf)
        else:
            weight = jnp.ones(ids.shape, x.dtype) if seen is None else seen.astype(x.dtype)
            x = jnp.einsum("nlw,nl->nw", x, weight / weight.sum(axis=1, keepdims=True))
        x = x.astype(jnp.float32)
        return nn.Dense(self.out_dim, name="head")(x) if self.projected else x


def _position(ids: jax.Array, pooling: str, seen: jax.Array | None) -> jax.Array | None:
    """int [n]: the one position that is pooled, None if all are."""
    if pooling == "first":
        return jnp.zeros(len(ids), jnp.int32)
    if pooling == "last":
        return (jnp.full(len(ids), ids.shape[1]) if seen is None else seen.sum(axis=1)) - 1
    return None
