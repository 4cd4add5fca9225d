"""How captions lie in the rows that the text tower works through: one in each, or several side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.models.dense import Dense
from lit_fast.models.sizes import Shape
from lit_fast.models.transformer import Encoder, MAPHead


class Rows(NamedTuple):
    """Rows of `length` tokens with k captions each; None where there is nothing to tell apart."""

    first: jax.Array  # int32 [n, k], where a caption begins
    last: jax.Array  # int32 [n, k], its last token
    member: jax.Array | None  # bool [n, k, length], true for the tokens of the caption; None: all
    mask: jax.Array | None  # bool [n, 1, 1 or length, length], what a token may look at; None: all
    position: jax.Array | None  # int32 [n, length], of a token in its caption; None: that in the row


def one_each(ids: jax.Array, eos_id: int | None) -> Rows:
    """Rows that are a caption with its padding, which is hidden if the end-of-sentence is given.

    ids: int [n, length]. A caption ends with the first end-of-sentence; without `eos_id` with the row.
    """
    first = jnp.zeros((len(ids), 1), jnp.int32)
    if eos_id is None:
        return Rows(first, first + ids.shape[1] - 1, None, None, None)
    end = ids == eos_id
    seen = jnp.cumsum(end, axis=1) - end == 0  # up to and including the first end-of-sentence
    member = seen[:, None, :]
    return Rows(first, member.sum(axis=2) - 1, member, member[:, None], None)


def side_by_side(lengths: jax.Array, length: int) -> Rows:
    """Rows of captions that follow one another, and filling at the end.

    lengths: int [n, k], of the captions; their sum is at most `length`. Captions do not see each other, and
    the filling sees itself.
    """
    last = jnp.cumsum(lengths.astype(jnp.int32), axis=1)
    first = last - lengths
    place = jnp.arange(length)
    owner = (place >= last[:, :, None]).sum(axis=1)  # [n, length]; the filling's is k
    member = owner[:, None, :] == jnp.arange(lengths.shape[1])[:, None]
    begin = jnp.einsum("nkl,nk->nl", member.astype(jnp.int32), first)
    position = jnp.where(owner < lengths.shape[1], place - begin, 0)
    return Rows(first, last - 1, member, owner[:, None, :, None] == owner[:, None, None, :], position)


def unpacked(ids: jax.Array, lengths: jax.Array, slots: jax.Array, length: int) -> jax.Array:
    """The captions one by one, int32 [m, length], filled up with -1.

    Args:
      ids: int [n, row tokens].
      lengths: int [n, k].
      slots: int [m], which of the n k captions of all rows to take.
      length: of the longest caption.
    """
    row, k = jnp.divmod(slots, lengths.shape[1])
    size = lengths.astype(jnp.int32)
    first = (jnp.cumsum(size, axis=1) - size)[row, k]
    place = jnp.arange(length)
    taken = ids.astype(jnp.int32)[row[:, None], jnp.minimum(first[:, None] + place, ids.shape[1] - 1)]
    return jnp.where(place < size[row, k][:, None], taken, -1)


# The text tower that is trained.


GELU = "tanh"
EPSILON = 1e-6  # of every LayerNorm


class TextTower(nn.Module):
    """Token embedding, learned positions, encoder, pooling, head (big_vision, text_transformer.py).

    ids: int [n, max_length] -> float32 [n, out_dim], not normalised. `pooling` takes the "last"
    position or the "first", the "mean" or the "max" over all, or is a "map" head.

    `eos_id` as a number hides what follows the first end-of-sentence from attention and pooling; "last"
    is then the end-of-sentence itself, and the result does not depend on the length of the padding. None
    is the paper's rule: padding is ordinary tokens and is attended to, and the last position is whatever
    the caption is padded with.

    With `lengths` int [n, k] a row of ids int [n, tokens] holds k captions without padding, side by side,
    and the result is float32 [n k, out_dim]: what each of them gets alone when padding is hidden. `pack` > 1
    lays that many captions side by side with their padding, where it is not hidden and n is a multiple: the
    result is the same, from larger products.

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
    pack: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: jax.Array, lengths: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        if lengths is None and self.pack > 1 and self.eos_id is None and len(ids) % self.pack == 0:
            ids = ids.reshape(-1, self.pack * self.max_length)
            lengths = jnp.full((len(ids), self.pack), self.max_length)
        rows = one_each(ids, self.eos_id) if lengths is None else side_by_side(lengths, ids.shape[1])
        x = self._embedded(ids)
        init = nn.initializers.normal(stddev=self.shape.width**-0.5)
        table = self.param("pos_embedding", init, (1, self.max_length, self.shape.width), jnp.float32)
        if rows.position is None:
            x = x + table
        else:  # a product, as its gradient is one as well, and exact
            choice = jax.nn.one_hot(rows.position, self.max_length)
            x = x + jnp.einsum("ntl,lw->ntw", choice, table[0], precision="highest")
        x = nn.Dropout(self.dropout)(x, deterministic)
        encoder = Encoder(self.shape, GELU, EPSILON, self.dropout, self.keep, self.dtype)
        position = {"first": rows.first, "last": rows.last}.get(self.pooling)
        x = encoder(x, rows.mask, deterministic, position)
        if position is None:
            x = self._pooled(x, rows)
        x = x.astype(jnp.float32).reshape(-1, self.shape.width)
        return Dense((self.out_dim,), mapped=self.dropout > 0, name="head")(x) if self.projected else x

    def _embedded(self, ids: jax.Array) -> jax.Array:
        """[n, tokens, width]."""
        width = self.shape.width
        init = nn.initializers.normal(stddev=width**-0.5)
        if not self.embedding_width:
            return nn.Embed(self.vocab_size, width, embedding_init=init)(ids)
        rows = nn.initializers.normal(stddev=self.embedding_width**-0.5)
        x = nn.Embed(self.vocab_size, self.embedding_width, embedding_init=rows)(ids)
        name = "embedding_projection"
        return Dense(
            (width,), use_bias=False, kernel_init=init, dtype=self.dtype, mapped=self.dropout > 0, name=name
        )(x)

    def _pooled(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[n, tokens, width] -> [n, k, width]."""
        if self.pooling == "map":
            mask = None if rows.member is None else rows.member[:, None]
            return MAPHead(self.shape, GELU, EPSILON, self.dtype, self.dropout)(x, mask)
        if rows.member is None:
            return (x.max if self.pooling == "max" else x.mean)(axis=1, keepdims=True)
        if self.pooling == "mean":
            weight = rows.member.astype(x.dtype)
            return jnp.einsum("ntw,nkt->nkw", x, weight / weight.sum(axis=2, keepdims=True))
        largest = lambda one: x.max(axis=1, where=one[:, :, None], initial=-jnp.inf)  # noqa: E731
        return jnp.stack([largest(rows.member[:, k]) for k in range(rows.member.shape[1])], axis=1)
