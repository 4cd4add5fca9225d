"""How captions lie in the rows that the text tower works through: one in each, or several side by side."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
