"""The text tower, whose rows hold one caption each or several packed ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.models.dense import Dense
from lit_fast.models.sizes import Shape
from lit_fast.models.transformer import Encoder, MAPHead, dropout, fold_keys

GELU = "tanh"
EPSILON = 1e-6  # of every LayerNorm

# Names of parameters.
TABLE, ENCODER = "Embed_0", "Encoder_0"


class RowLayout(NamedTuple):
    """The k captions of each of n rows of `length` tokens.

    Without a mask all tokens take part; without `positions` a token's position is that in the row.
    """

    first: jax.Array  # int32 [n, k], the first token of a caption
    last: jax.Array  # int32 [n, k], its last token
    caption_mask: jax.Array | None  # bool [n, k, length], true for the tokens of the caption
    attention_mask: jax.Array | None  # bool [n, 1, 1 or length, length], true where a query attends
    positions: jax.Array | None  # int32 [n, length], of a token in its caption
    caption: jax.Array | None = (
        None  # int32 [n, length], number of a token's caption in its row; k for padding
    )

    @classmethod
    def unpacked(cls, ids: jax.Array, eos_id: int | None) -> RowLayout:
        """Return the layout of rows that are one padded caption each: ids int [n, length].

        A caption ends with the first end-of-sentence, and attention and pooling ignore the padding. Without `eos_id`
        it ends with the row.
        """
        first = jnp.zeros((len(ids), 1), jnp.int32)
        if eos_id is None:
            return cls(first, first + ids.shape[1] - 1, None, None, None)
        end = ids == eos_id
        # up to and including the first end-of-sentence
        mask = (jnp.cumsum(end, axis=1) - end == 0)[:, None, :]
        return cls(first, mask.sum(axis=2) - 1, mask, mask[:, None], None)

    @classmethod
    def packed(cls, lengths: jax.Array, length: int) -> RowLayout:
        """Return the layout of rows of consecutive captions with padding at the end.

        lengths: int [n, k], of the captions; their sum is at most `length`. Captions attend to themselves only, and
        so does the padding. A length of 0 is a place without a caption: one token stands for it, which one is of no
        importance.
        """
        end = jnp.cumsum(lengths.astype(jnp.int32), axis=1)
        first = jnp.minimum(end - lengths, length - 1)
        index = jnp.arange(length)
        caption = (index >= end[:, :, None]).sum(axis=1)  # [n, length]; k for padding
        mask = caption[:, None, :] == jnp.arange(lengths.shape[1])[:, None]
        start = jnp.einsum("nkl,nk->nl", mask.astype(jnp.int32), first)
        positions = jnp.where(caption < lengths.shape[1], index - start, 0)
        attention_mask = caption[:, None, :, None] == caption[:, None, None, :]
        mask |= (lengths == 0)[:, :, None] & (index == first[:, :, None])
        return cls(first, jnp.maximum(end - 1, first), mask, attention_mask, positions, caption)


def unpack_captions(ids: jax.Array, lengths: jax.Array, slots: jax.Array, length: int) -> jax.Array:
    """Take captions out of packed rows, int32 [m, length], padded with -1.

    Args:
      ids: int [n, row tokens].
      lengths: int [n, k].
      slots: int [m], indices among the n k captions of all rows.
      length: of the longest caption.
    """
    row, k = jnp.divmod(slots, lengths.shape[1])
    sizes = lengths.astype(jnp.int32)
    first = (jnp.cumsum(sizes, axis=1) - sizes)[row, k]
    index = jnp.arange(length)
    captions = ids.astype(jnp.int32)[row[:, None], jnp.minimum(first[:, None] + index, ids.shape[1] - 1)]
    return jnp.where(index < sizes[row, k][:, None], captions, -1)


class TextTower(nn.Module):
    """Token embedding, learned positions, encoder, pooling, head (big_vision, text_transformer.py).

    `pooling` takes the "last" position or the "first", the "mean" or the "max" over all, or is a "map" head.

    With `eos_id`, attention and pooling ignore the tokens after the first end-of-sentence; "last" is then the
    end-of-sentence itself, and the result does not depend on the amount of padding. None is the paper's rule: padding
    is ordinary tokens, and the last position is the last token of the padding.

    `pack` > 1 joins that many padded captions to one row where padding is not ignored and the number of captions is a
    multiple: the same result from larger matrix products.

    `embedding_width` K > 0 makes the table vocabulary x K, followed by a K x width projection without bias (paper,
    section 4.3). Rows of norm about 1 as in the plain table, times a projection of variance 1 / width, give token
    embeddings of the plain table's scale: variance 1 / width.

    Without `projected` there is no head, and `out_dim` is the width.
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
    pack: int = 1
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the parameters, under big_vision's names."""
        width, dtype = self.shape.width, self.dtype
        normal = nn.initializers.normal
        init = normal(stddev=width**-0.5)
        if self.embedding_width:
            narrow_init = normal(stddev=self.embedding_width**-0.5)
            self.table = nn.Embed(
                self.vocab_size, self.embedding_width, embedding_init=narrow_init, name=TABLE
            )
            self.projection = Dense(
                (width,), use_bias=False, kernel_init=init, dtype=dtype, name="embedding_projection"
            )
        else:
            self.table = nn.Embed(self.vocab_size, width, embedding_init=init, name=TABLE)
        self.pos_embedding = self.param("pos_embedding", init, (1, self.max_length, width), jnp.float32)
        self.encoder = Encoder(self.shape, GELU, EPSILON, self.dropout, dtype=dtype, name=ENCODER)
        if self.pooling == "map":
            self.map_head = MAPHead(self.shape, GELU, EPSILON, dtype, name="MAPHead_0")
        if self.projected:
            self.head = Dense((self.out_dim,), name="head")

    def __call__(
        self, ids: jax.Array, lengths: jax.Array | None = None, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """Embed captions, not normalized.

        Args:
          ids: int [n, max_length], one padded caption per row; with `lengths` int [n, row tokens].
          lengths: int [n, k], of the k captions that are packed into each row without padding between them. Each is
            embedded as if alone with its padding ignored.
          dropout_keys: PRNG keys [n], one per row; None: no dropout.

        Returns:
          float32 [n, out_dim]; with `lengths` [n k, out_dim].
        """
        ids, layout = self.rows(ids, lengths, joined=dropout_keys is None)
        x = self.embed(self.table(ids), layout, dropout_keys)
        positions = self.output_positions(layout)
        return self.pool(
            self.encoder(x, layout.attention_mask, positions, fold_keys(dropout_keys, 1)), layout
        )

    def rows(
        self, ids: jax.Array, lengths: jax.Array | None, joined: bool = True
    ) -> tuple[jax.Array, RowLayout]:
        """Return the rows of the encoder, int [n, tokens], and their layout; arguments as of `__call__`.

        Padded captions are packed by `pack` only if `joined`.
        """
        if lengths is None and joined and self.joins(len(ids)):
            ids = ids.reshape(-1, self.pack * self.max_length)
            lengths = jnp.full((len(ids), self.pack), self.max_length)
        if lengths is None:
            return ids, RowLayout.unpacked(ids, self.eos_id)
        return ids, RowLayout.packed(lengths, ids.shape[1])

    def joins(self, captions: int) -> bool:
        """Whether that many padded captions are packed."""
        return self.pack > 1 and self.eos_id is None and captions % self.pack == 0

    def embed(self, tokens: jax.Array, layout: RowLayout, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Return the input of the encoder [n, tokens, width], of entries of the table [n, tokens, table width]."""
        x = self.projection(tokens) if self.embedding_width else tokens
        if layout.positions is None:
            x = x + self.pos_embedding
        else:  # a matrix product, exact, whose gradient is one as well
            one_hot = jax.nn.one_hot(layout.positions, self.max_length)
            x = x + jnp.einsum("ntl,lw->ntw", one_hot, self.pos_embedding[0], precision="highest")
        return dropout(x, self.dropout, fold_keys(dropout_keys, 0))

    def output_positions(self, layout: RowLayout) -> jax.Array | None:
        """Return the positions [n, k] whose outputs of the encoder are pooled; None: all."""
        return {"first": layout.first, "last": layout.last}.get(self.pooling)

    def pool(self, x: jax.Array, layout: RowLayout) -> jax.Array:
        """Return the embeddings float32 [n k, out_dim], of the encoder's output float32 [n, tokens or k, width]."""
        if self.output_positions(layout) is None:
            x = self._pool(x, layout)
        x = x.astype(jnp.float32).reshape(-1, self.shape.width)
        return self.head(x) if self.projected else x

    def _pool(self, x: jax.Array, layout: RowLayout) -> jax.Array:
        """Pool tokens [n, tokens, width] to captions [n, k, width]."""
        mask = layout.caption_mask
        if self.pooling == "map":
            return self.map_head(x, None if mask is None else mask[:, None])
        if mask is None:
            return (x.max if self.pooling == "max" else x.mean)(axis=1, keepdims=True)
        if self.pooling == "mean":
            weight = mask.astype(x.dtype)
            return jnp.einsum("ntw,nkt->nkw", x, weight / weight.sum(axis=2, keepdims=True))
        maxima = [x.max(axis=1, where=mask[:, k, :, None], initial=-jnp.inf) for k in range(mask.shape[1])]
        return jnp.stack(maxima, axis=1)
