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

**True lengths.** `captions` int32 [rows, tokens] has the number of each token's caption in its row; keys of other
captions are masked out of the scores [tokens, tokens].

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
EQUAL_LENGTHS = (16, 32, 64, 128)  # of captions that need no masks; 8 keys do not fill a register of bfloat16
_VMEM_BYTES = 14 * 2**20  # of 16 MiB; the rest is for what the compiler spills
_LOG2E = 1.4426950408889634
_MASKED = -1e30

Captions = int | jax.Array
"""The tokens of every caption, or the number of each token's caption in its row, int32 [rows, tokens]."""


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
    unit = LANES if tokens > LANES else 8
    if tokens % unit:
        return f"rows of {tokens} tokens are not a multiple of {unit}"
    # The operands and results of the backward pass, twice (one is computed, the next is in transfer), and the bias.
    width = heads * size
    needed = 2 * (2 * 3 + 2) * width * tokens * 2 + 2 * 3 * width * LANES * 4 + 3 * tokens * tokens * 4
    if needed > _VMEM_BYTES:
        return f"a row of {tokens} tokens and width {width} needs {needed / 2**20:.0f} MiB of vector memory"
    return ""


def kernel_name(direction: str, length: int | None, heads: int, size: int) -> str:
    """Return the name of a kernel in compiled programs.

    Args:
      direction: "forward" or "backward".
      length: of every caption; None: true lengths.
      heads, size: number of heads and their size.
    """
    return f"attention_{direction}_{f'length{length}' if length else 'masked'}_{heads}x{size}"


def forward(qkv: jax.Array, captions: Captions, heads: int) -> jax.Array:
    """Attend: qkv bfloat16 [rows, 3 width, tokens] -> y bfloat16 [rows, width, tokens]."""
    rows, width, tokens = qkv.shape[0], qkv.shape[1] // 3, qkv.shape[2]
    outputs = [jax.ShapeDtypeStruct((rows, width, tokens), jnp.bfloat16)]
    return _call(forward_kernel, "forward", heads, captions, [qkv], outputs)[0]


def backward(
    qkv: jax.Array, captions: Captions, heads: int, g: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what the backward pass needs.

    Args:
      qkv: bfloat16 [rows, 3 width, tokens].
      g: gradient of y, bfloat16 [rows, width, tokens].
      bias: float32 [3 width].

    Returns:
      the gradient of qkv, bfloat16 [rows, 3 width, tokens];
      y as of `forward`, computed again;
      the sum over the 3 width elements of a token of `dqkv (qkv - bias)`, divided by width, float32 [rows, tokens].
    """
    rows, width, tokens = qkv.shape[0], qkv.shape[1] // 3, qkv.shape[2]
    lanes = jnp.broadcast_to(bias.astype(jnp.float32)[:, None], (3 * width, min(tokens, LANES)))
    outputs = [
        jax.ShapeDtypeStruct(qkv.shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, width, tokens), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, 1, tokens), jnp.float32),
    ]
    dqkv, y, mean = _call(backward_kernel, "backward", heads, captions, [qkv, g, lanes], outputs)
    return dqkv, y, mean[:, 0]


def _call(
    kernel: Callable[..., None],
    direction: str,
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
        inputs = [*inputs, captions[:, None]]
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
        name=kernel_name(direction, length, heads, inputs[0].shape[1] // 3 // heads),
    )
    return lax.platform_dependent(*inputs, tpu=call(), cpu=call(interpret=True))


# --- the kernels


class _Keys(NamedTuple):
    """How a kernel restricts scores, float32 [tokens, tokens], to the keys of each query's caption.

    n is the number of keys that are looked at: the length of a caption, or all tokens of the row.
    """

    select: Callable[[jax.Array], jax.Array]
    """[tokens, tokens] -> [n, tokens]; keys of other captions may be left."""
    mask: Callable[[jax.Array], jax.Array]
    """[n, tokens] -> [n, tokens], very small where keys of other captions are left."""
    spread: Callable[[jax.Array], jax.Array]
    """[n, tokens], zero where keys of other captions are left -> bfloat16 [tokens, tokens], zero for all of them."""


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

    return _Keys(select, mask=lambda scores: scores, spread=spread)


def _keys_of_same_caption(captions: jax.Array, tokens: int) -> _Keys:
    """Return the restriction by the captions int32 [1, tokens]."""
    of_query = jnp.broadcast_to(captions, (tokens, tokens))
    same = of_query == of_query.T
    return _Keys(
        select=lambda scores: scores,
        mask=lambda scores: jnp.where(same, scores, _MASKED),
        spread=lambda p: p.astype(jnp.bfloat16),
    )


def _softmax(keys: _Keys, q: jax.Array, k: jax.Array) -> jax.Array:
    """Return the weights float32 [n, tokens] of queries and keys [size, tokens]."""
    scores = keys.mask(keys.select(_tn(k, q)) * (q.shape[0] ** -0.5 * _LOG2E))
    p = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
    return p * (1.0 / p.sum(axis=0, keepdims=True))


def _rows(part: int, head: int, heads: int, size: int) -> Any:
    """Return the index of a head in queries (part 0), keys (1) or values (2)."""
    return pl.ds((part * heads + head) * size, size)


def forward_kernel(qkv_ref: Any, *refs: Any, heads: int, length: int | None) -> None:
    *captions_ref, y_ref = refs
    tokens, size = qkv_ref.shape[2], y_ref.shape[1] // heads
    keys = (
        _keys_of_equal_captions(length, tokens)
        if length
        else _keys_of_same_caption(captions_ref[0][0], tokens)
    )
    for head in range(heads):
        q, k, v = (qkv_ref[0, _rows(part, head, heads, size), :] for part in range(3))
        p = _softmax(keys, q, k)
        y_ref[0, _rows(0, head, heads, size), :] = _nn(v, keys.spread(p)).astype(jnp.bfloat16)


def backward_kernel(
    qkv_ref: Any, g_ref: Any, bias_ref: Any, *refs: Any, heads: int, length: int | None
) -> None:
    *captions_ref, dqkv_ref, y_ref, mean_ref = refs
    tokens, size = qkv_ref.shape[2], y_ref.shape[1] // heads
    keys = (
        _keys_of_equal_captions(length, tokens)
        if length
        else _keys_of_same_caption(captions_ref[0][0], tokens)
    )
    sums = jnp.zeros((size, tokens), jnp.float32)
    for head in range(heads):
        q, k, v = (qkv_ref[0, _rows(part, head, heads, size), :] for part in range(3))
        g = g_ref[0, _rows(0, head, heads, size), :]
        p = _softmax(keys, q, k)
        weights = keys.spread(p)
        y_ref[0, _rows(0, head, heads, size), :] = _nn(v, weights).astype(jnp.bfloat16)
        dp = keys.select(_tn(v, g))
        ds = keys.spread(p * (dp - (p * dp).sum(axis=0, keepdims=True)))
        gradients = _nn(k, ds) * size**-0.5, _nt(q, ds) * size**-0.5, _nt(g, weights)
        for part, gradient in enumerate(gradients):
            at = _rows(part, head, heads, size)
            dqkv_ref[0, at, :] = gradient.astype(jnp.bfloat16)
            bias = jnp.concatenate([bias_ref[at, :]] * -(-tokens // LANES), axis=1)
            sums += gradient * (qkv_ref[0, at, :].astype(jnp.float32) - bias)
    mean_ref[0] = sums.sum(axis=0, keepdims=True) * (1 / (heads * size))


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


_tn = partial(_product, contracted=(0, 0))  # a^T b
_nn = partial(_product, contracted=(1, 0))  # a b
_nt = partial(_product, contracted=(1, 1))  # a b^T
