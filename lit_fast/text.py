"""The text tower that is trained."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.transformer import Encoder
from lit_fast.variants import Shape


class TextTower(nn.Module):
    """Token embedding, learned positions, encoder, pooling, head (big_vision, text_transformer.py).

    ids: int [n, length] -> float32 [n, out_dim], not normalised. `pooling` takes the last position, which
    always holds end-of-sentence, or the mean. `pad_id` as a number hides padding (every `pad_id` after
    the first, which ends the sentence) from attention and mean; None is the paper's rule: padding is
    ordinary end-of-sentence and is attended to.
    """

    shape: Shape
    vocab_size: int
    max_length: int
    out_dim: int
    pooling: str = "last"
    pad_id: int | None = None
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, deterministic: bool = True) -> jax.Array:
        width = self.shape.width
        init = nn.initializers.normal(stddev=width**-0.5)
        x = nn.Embed(self.vocab_size, width, embedding_init=init)(ids)
        x = x + self.param("pos_embedding", init, (1, self.max_length, width), jnp.float32)
        x = nn.Dropout(self.dropout)(x, deterministic)
        seen = None
        if self.pad_id is not None:
            ended = jnp.cumsum(ids == self.pad_id, axis=1)
            seen = ended - (ids == self.pad_id) == 0  # up to and including the first end-of-sentence
            if self.pooling == "last":
                raise ValueError("hidden padding and last-token pooling exclude each other")
        mask = None if seen is None else seen[:, None, None, :]
        encoder = Encoder(self.shape, "tanh", 1e-6, self.dropout, self.remat, self.dtype)
        x = encoder(x, mask, deterministic)
        if self.pooling == "last":
            x = x[:, -1]
        else:
            weight = jnp.ones(ids.shape, x.dtype) if seen is None else seen.astype(x.dtype)
            x = jnp.einsum("nlw,nl->nw", x, weight / weight.sum(axis=1, keepdims=True))
        return nn.Dense(self.out_dim, name="head")(x)
