"""Attention of packed rows as Pallas kernels for TPUs: each token attends to the tokens of its own caption.

XLA computes all scores of a row, of which 1/8 are needed, and moves them through memory five times. These kernels keep
one head's scores in registers.

**Arrays.** `qkv` is bfloat16 [rows, 3 heads size, tokens]: queries of all heads, keys, values. Tokens are the last
axis, which fills the 128 lanes of a register. A head is a slice of `size` rows, without copies or transposes:

    scores  [keys, queries] = k^T q     softmax over keys, along sublanes
    y       [size, queries] = v p
    dp      [keys, queries] = v^T g
    dq, dk, dv              = k ds, q ds^T, g p^T

**Grid.** One step per row; the heads are unrolled, so that the scheduler overlaps one head's products with another's
softmax. Captions of one length S (a power of two that divides 128) need no keys of other 128-token blocks, so a row is
split in blocks of 128 tokens and each is a step of its own.

**Captions of one length.** Of the [128, 128] scores a query needs the S of its own caption. They are selected into
[S, 128] (S = 16: 2 registers instead of 16), where softmax and its gradient are computed. For the products they are
spread to [128, 128] with zeros elsewhere, by masks on pairs of bfloat16.

**True lengths.** `bounds` int32 [rows, 2, tokens] has the first and the last token of each token's caption; other keys
are masked out of the scores [tokens, tokens].

Products have bfloat16 operands and float32 sums; softmax and its gradient are float32. Weights and gradients of scores
are rounded to bfloat16 for the products, as in XLA's form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_VMEM_BYTES = 14 * 2**20  # of 16 MiB; the rest is for what the compiler spills
_LOG2E = 1.4426950408889634
_MASKED = -1e30

Captions = int | jax.Array
"""The tokens of every caption, or `bounds` int32 [rows, 2, tokens]."""


def refusal(heads: int, size: int, tokens: int, dtype: Any) -> str:
    """Return why the kernels cannot serve rows of `tokens` tokens; empty: they can.

    Args:
      heads, size: number of heads and their size.
      tokens: length of a row.
      dtype: of the products.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"text.dtype is {jnp.dtype(dtype).name}, not bfloat16"
    if size % 16:
        return f"the head size {size} is not a multiple of 16"
    if tokens % LANES:
        return f"rows of {tokens} tokens are not a multiple of {LANES}"
    # The operands and results of the backward pass, twice (one is computed, the next is in transfer), and the bias.
    width = heads * size
    needed = 2 * (2 * 3 + 2) * width * tokens * 2 + 2 * 3 * width * LANES * 4 + 3 * tokens * tokens * 4
    if needed > _VMEM_BYTES:
        return f"a row of {tokens} tokens and width {width} needs {needed / 2**20:.0f} MiB of vector memory"
    return ""


def bounds_of(caption_ids: jax.Array) -> jax.Array:
    """Return the bounds int32 [rows, 2, tokens] of consecutive captions, int [rows, tokens] (equal: same caption)."""
    index = jnp.arange(caption_ids.shape[1])
    before = jnp.pad(caption_ids[:, 1:] != caption_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    after = jnp.pad(caption_ids[:, 1:] != caption_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    first = lax.cummax(jnp.where(before, index, 0), axis=1)
    last = lax.cummin(jnp.where(after, index, len(index)), axis=1, reverse=True)
    return jnp.stack([first, last], axis=1).astype(jnp.int32)


def forward(qkv: jax.Array, captions: Captions, heads: int) -> jax.Array:
    """Attend: qkv bfloat16 [rows, 3 width, tokens] -> y bfloat16 [rows, width, tokens]."""
    rows, width, tokens = qkv.shape[0], qkv.shape[1] // 3, qkv.shape[2]
    outputs = [jax.ShapeDtypeStruct((rows, width, tokens), jnp.bfloat16)]
    return _call(_forward_kernel, "attention_forward", heads, captions, [qkv], outputs)[0]


def backward(
    qkv: jax.Array, captions: Captions, heads: int, g: jax.Array, rstd: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what the backward pass needs, where `qkv = rstd (x W') + bias` with LayerNorm folded into W'.

    Args:
      qkv: bfloat16 [rows, 3 width, tokens].
      g: gradient of y, bfloat16 [rows, width, tokens].
      rstd: float32 [rows, tokens].
      bias: float32 [3 width].

    Returns:
      rstd times the gradient of qkv, bfloat16 [rows, 3 width, tokens];
      y as of `forward`, computed again;
      rstd times the mean over the width of xhat and its gradient, float32 [rows, tokens]. As xhat W' = qkv - bias, it
      is 1 / width sum_j rstd dqkv_j (qkv_j - bias_j).
    """
    rows, width, tokens = qkv.shape[0], qkv.shape[1] // 3, qkv.shape[2]
    lanes = jnp.broadcast_to(bias.astype(jnp.float32)[:, None], (3 * width, LANES))
    outputs = [
        jax.ShapeDtypeStruct(qkv.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, width, tokens), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, 1, tokens), jnp.float32),
    ]
    inputs = [qkv, g, rstd[:, None], lanes]
    dqkv, y, mean = _call(_backward_kernel, "attention_backward", heads, captions, inputs, outputs)
    return dqkv, y, mean[:, 0]


def _call(
    kernel: Callable[..., None],
    name: str,
    heads: int,
    captions: Captions,
    inputs: list[jax.Array],
    outputs: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Run a kernel on each row, or on each 128 tokens of it where captions have one length.

    Arrays of three axes are [rows, n, tokens]; those of two are the same for all rows. On CPUs the kernel is
    interpreted, which is slow.
    """
    rows, _, tokens = outputs[0].shape
    length = captions if isinstance(captions, int) else None
    if not isinstance(captions, int):
        inputs = [*inputs, captions]
    block = LANES if length else tokens

    def spec(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if array.ndim == 2:
            return pl.BlockSpec(array.shape, lambda row, part: (0, 0))
        return pl.BlockSpec((1, array.shape[1], block), lambda row, part: (row, 0, part))

    call = partial(
        pl.pallas_call,
        partial(kernel, heads=heads, length=length),
        grid=(rows, tokens // block),
        in_specs=[spec(a) for a in inputs],
        out_specs=[spec(a) for a in outputs],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=name + ("" if length else "_bounds"),
    )
    return lax.platform_dependent(*inputs, tpu=call(), cpu=call(interpret=True))


# --- the kernels


class _Keys(NamedTuple):
    """How a kernel restricts scores, float32 [tokens, tokens], to the keys of each query's caption.

    n is the number of keys that are looked at: the length of a caption, or all tokens of the row.
    """

    select: Callable[
        [jax.Array], jax.Array
    ]  # [tokens, tokens] -> [n, tokens]; other captions' keys may be left
    mask: Callable[
        [jax.Array], jax.Array
    ]  # [n, tokens] -> [n, tokens], very small where keys of others are left
    spread: Callable[
        [jax.Array], jax.Array
    ]  # [n, tokens] -> bfloat16 [tokens, tokens], zero for keys of others


def _keys_of_equal_captions(length: int, tokens: int) -> _Keys:
    shift = length.bit_length() - 1  # Mosaic lowers no integer division without a device
    block = lax.broadcasted_iota(jnp.int32, (length, tokens), 1) >> shift
    pair_block = lax.broadcasted_iota(jnp.int32, (length // 2, tokens), 1) >> shift
    masks = [jnp.where(pair_block == b, -1, 0) for b in range(tokens // length)]

    def select(scores: jax.Array) -> jax.Array:
        own = scores[:length]
        for b in range(1, tokens // length):
            own = jnp.where(block == b, scores[b * length : (b + 1) * length], own)
        return own

    def spread(p: jax.Array) -> jax.Array:
        pairs = pltpu.bitcast(p.astype(jnp.bfloat16), jnp.int32)  # two keys in 32 bits
        return jnp.concatenate([pltpu.bitcast(pairs & mask, jnp.bfloat16) for mask in masks], axis=0)

    return _Keys(select, lambda scores: scores, spread)


def _keys_within(bounds: jax.Array, tokens: int) -> _Keys:
    key = lax.broadcasted_iota(jnp.int32, (tokens, tokens), 0)
    own = (key >= bounds[:1]) & (key <= bounds[1:])
    return _Keys(
        lambda scores: scores,
        lambda scores: jnp.where(own, scores, _MASKED),
        lambda p: p.astype(jnp.bfloat16),
    )


def _softmax(keys: _Keys, q: jax.Array, k: jax.Array) -> jax.Array:
    """Return the weights float32 [n, tokens] of queries and keys [size, tokens]."""
    scores = keys.mask(keys.select(_tn(k, q)) * (q.shape[0] ** -0.5 * _LOG2E))
    p = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
    return p * (1.0 / p.sum(axis=0, keepdims=True))


def _rows(part: int, head: int, heads: int, size: int) -> Any:
    """Return the index of a head in queries (part 0), keys (1) or values (2)."""
    return pl.ds((part * heads + head) * size, size)


def _forward_kernel(qkv_ref: Any, *refs: Any, heads: int, length: int | None) -> None:
    *bounds_ref, y_ref = refs
    tokens, size = qkv_ref.shape[2], y_ref.shape[1] // heads
    keys = _keys_of_equal_captions(length, tokens) if length else _keys_within(bounds_ref[0][0], tokens)
    for head in range(heads):
        q, k, v = (qkv_ref[0, _rows(part, head, heads, size), :] for part in range(3))
        p = _softmax(keys, q, k)
        y_ref[0, _rows(0, head, heads, size), :] = _nn(v, keys.spread(p)).astype(jnp.bfloat16)


def _backward_kernel(
    qkv_ref: Any, g_ref: Any, rstd_ref: Any, bias_ref: Any, *refs: Any, heads: int, length: int | None
) -> None:
    *bounds_ref, dqkv_ref, y_ref, mean_ref = refs
    tokens, size = qkv_ref.shape[2], y_ref.shape[1] // heads
    keys = _keys_of_equal_captions(length, tokens) if length else _keys_within(bounds_ref[0][0], tokens)
    rstd = rstd_ref[0]
    scaled_rstd = rstd * size**-0.5
    sums = jnp.zeros((size, tokens), jnp.float32)
    for head in range(heads):
        q, k, v = (qkv_ref[0, _rows(part, head, heads, size), :] for part in range(3))
        g = g_ref[0, _rows(0, head, heads, size), :]
        p = _softmax(keys, q, k)
        weights = keys.spread(p)
        y_ref[0, _rows(0, head, heads, size), :] = _nn(v, weights).astype(jnp.bfloat16)
        dp = keys.select(_tn(v, g))
        ds = keys.spread(p * (dp - (p * dp).sum(axis=0, keepdims=True)))
        gradients = _nn(k, ds) * scaled_rstd, _nt(q, ds) * scaled_rstd, _nt(g, weights) * rstd
        for part, gradient in enumerate(gradients):
            at = _rows(part, head, heads, size)
            dqkv_ref[0, at, :] = gradient.astype(jnp.bfloat16)
            bias = jnp.concatenate([bias_ref[at, :]] * (tokens // LANES), axis=1)
            sums += gradient * (qkv_ref[0, at, :].astype(jnp.float32) - bias)
    mean_ref[0] = sums.sum(axis=0, keepdims=True) * (1 / (heads * size))


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


_tn = partial(_product, contracted=(0, 0))  # a^T b
_nn = partial(_product, contracted=(1, 0))  # a b
_nt = partial(_product, contracted=(1, 1))  # a b^T
