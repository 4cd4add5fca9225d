"""Attention for the training pass: a forward and a backward function, which other kernels can replace.

`lit_fast.models.encoder_pass` computes queries, keys and values, and needs of attention only these two functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.models import packed_attention
from lit_fast.models.text_tower import RowLayout

Projections = tuple[jax.Array, ...]
"""Queries, keys and values of n rows, token by token, heads after each other: three arrays [n, tokens, width], or, if
joined, one [n, tokens, 3 width] in this order. Neither is scaled."""


class Attention(NamedTuple):
    """A formulation of attention. Arrays have the dtype of the projections where none is given."""

    joined: bool  # queries, keys and values are one product, see `Projections`

    forward: Callable[[Projections, RowLayout], jax.Array]
    """(u, layout) -> y [n, tokens, width], the attended values, heads after each other."""

    backward: Callable[
        [Projections, jax.Array, RowLayout, jax.Array], tuple[Projections, jax.Array, jax.Array | None]
    ]
    """(u, dy, layout, bias) -> (du, y, c): of the gradient of y the gradient of u, and y again.

    `bias` is float32 [3 width], that of the projections. `c` is float32 [n, tokens]: the sum of `du (u - bias)` over
    all 3 width elements of a token, divided by width. It completes the gradient of LayerNorm; None: the caller
    computes it in another way."""


def xla_attention(heads: int, joined: bool) -> Attention:
    """Return the formulation in plain products, for all masks; scores and softmax are float32."""

    def split(u: Projections) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, scaled, keys and values as [n, heads, tokens, size]."""
        n, tokens, width = u[0].shape
        if joined:
            parts = u[0].reshape(n, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
            q, k, v = parts[0], parts[1], parts[2]
        else:
            q, k, v = (a.reshape(n, tokens, heads, width // heads).swapaxes(1, 2) for a in u)
        return q * q.shape[-1] ** -0.5, k, v

    def join(*gradients: jax.Array) -> Projections:
        n, _, tokens, _ = gradients[0].shape
        if joined:
            return (jnp.stack(gradients).transpose(1, 3, 0, 2, 4).reshape(n, tokens, -1),)
        return tuple(a.swapaxes(1, 2).reshape(n, tokens, -1) for a in gradients)

    def merge(a: jax.Array) -> jax.Array:
        return a.swapaxes(1, 2).reshape(len(a), a.shape[2], -1)

    def forward(u: Projections, layout: RowLayout) -> jax.Array:
        q, k, v = split(u)
        weights, total = _weights(q, k, layout.attention_mask)
        return merge((_einsum("nhqk,nhkd->nhqd", weights, v) / total).astype(v.dtype))

    def backward(
        u: Projections, dy: jax.Array, layout: RowLayout, bias: jax.Array
    ) -> tuple[Projections, jax.Array, None]:
        q, k, v = split(u)
        dtype, size = v.dtype, v.shape[-1]
        weights, total = _weights(q, k, layout.attention_mask)
        y = _einsum("nhqk,nhkd->nhqd", weights, v) / total
        # The division by the sum of the weights is done on the smaller array.
        dy = dy.reshape(len(dy), -1, heads, size).swapaxes(1, 2).astype(jnp.float32) / total
        mean = (dy * y).sum(axis=-1, keepdims=True)
        dy = dy.astype(dtype)
        dscores = weights * (_einsum("nhqd,nhkd->nhqk", dy, v) - mean)
        dscores = dscores.astype(dtype)
        dq = (_einsum("nhqk,nhkd->nhqd", dscores, k) * size**-0.5).astype(dtype)
        dk = _einsum("nhqk,nhqd->nhkd", dscores, q).astype(dtype)
        dv = _einsum("nhqk,nhqd->nhkd", weights, dy).astype(dtype)
        return join(dq, dk, dv), merge(y.astype(dtype)), None

    return Attention(joined, forward, backward)


def pallas_attention(heads: int, length: int) -> Attention:
    """Return the kernels of `lit_fast.models.packed_attention`.

    Args:
      heads: number of heads.
      length: tokens of every caption of a packed row; 0: rows are packed by true lengths. Rows that do not fill whole
        registers have the form for true lengths in both cases.
    """

    def captions(layout: RowLayout) -> int | jax.Array:
        if layout.caption is None:
            raise ValueError("these kernels serve packed rows only")
        return layout.caption if not length or layout.caption.shape[1] % packed_attention.LANES else length

    def forward(u: Projections, layout: RowLayout) -> jax.Array:
        return packed_attention.forward(u[0].swapaxes(1, 2), captions(layout), heads).swapaxes(1, 2)

    def backward(
        u: Projections, dy: jax.Array, layout: RowLayout, bias: jax.Array
    ) -> tuple[Projections, jax.Array, jax.Array]:
        du, y, c = packed_attention.backward(
            u[0].swapaxes(1, 2), captions(layout), heads, dy.swapaxes(1, 2), bias
        )
        return (du.swapaxes(1, 2),), y.swapaxes(1, 2), c

    return Attention(True, forward, backward)


def _einsum(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the weights [n, heads, queries, keys], not normalized, and their sums, float32 [n, heads, queries, 1]."""
    scores = _einsum("nhqd,nhkd->nhqk", q, k)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(q.dtype)
    return weights, weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
