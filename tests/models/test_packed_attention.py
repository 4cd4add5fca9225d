"""The Pallas kernels, interpreted on the CPU, against softmax attention in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.models.packed_attention import backward, forward, refusal

# Operands are bfloat16 numbers for both. The kernels round weights, gradients of scores and results once each to
# bfloat16, whose relative error is uniform up to 2^-9 to 2^-8: 0.0016 root mean square for one rounding, so 0.0023 for
# two. Measured are 0.0021 to 0.0028; any wrong key, scale or sign gives more than 0.1.
TOLERANCE = 0.004


def softmax_attention(qkv, captions, heads):
    """qkv float32 [rows, 3 width, tokens], captions [rows, tokens] -> y float32 [rows, width, tokens]."""
    rows, width, tokens = qkv.shape[0], qkv.shape[1] // 3, qkv.shape[2]
    q, k, v = (a.reshape(rows, heads, -1, tokens) for a in jnp.split(qkv, 3, axis=1))
    scores = jnp.einsum("rhdk,rhdq->rhkq", k, q, precision="highest") * (width // heads) ** -0.5
    same = captions[:, None, :, None] == captions[:, None, None, :]
    p = jax.nn.softmax(jnp.where(same, scores, -jnp.inf), axis=2)
    return jnp.einsum("rhdk,rhkq->rhdq", v, p, precision="highest").reshape(rows, width, tokens)


@partial(jax.jit, static_argnames="heads")
def expected(qkv, captions, heads, g, bias):
    qkv = qkv.astype(jnp.float32)
    y, pull = jax.vjp(lambda qkv: softmax_attention(qkv, captions, heads), qkv)
    dqkv = pull(g.astype(jnp.float32))[0]
    mean = (dqkv * (qkv - bias[:, None])).sum(axis=1) / y.shape[1]
    return y, dqkv, mean


@partial(jax.jit, static_argnames=("heads", "length"))
def actual(qkv, captions, heads, g, bias, length=None):
    layout = length or captions
    dqkv, y_again, mean = backward(qkv, layout, heads, g, bias)
    return forward(qkv, layout, heads), y_again, dqkv, mean


def operands(heads, size, tokens, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    width = heads * size
    qkv = jnp.asarray(1.5 * rng.normal(size=(rows, 3 * width, tokens)), jnp.bfloat16)
    g = jnp.asarray(rng.normal(size=(rows, width, tokens)), jnp.bfloat16)
    return qkv, g, jnp.asarray(rng.normal(size=3 * width), jnp.float32)


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def check(captions, heads, size, length=None, seed=0):
    qkv, g, bias = operands(heads, size, captions.shape[1], len(captions), seed)
    y, dqkv, mean = expected(qkv, captions, heads, g, bias)
    got_y, y_again, got_dqkv, got_mean = actual(qkv, captions, heads, g, bias, length)
    np.testing.assert_array_equal(got_y, y_again)
    assert error(got_y, y) < TOLERANCE
    assert error(got_mean, mean) < TOLERANCE
    for got, want in zip(jnp.split(got_dqkv, 3, axis=1), jnp.split(dqkv, 3, axis=1), strict=True):
        # A caption of one token has no gradient of queries and keys; differences of rounding are left.
        assert np.linalg.norm(np.float32(got) - want) < TOLERANCE * np.linalg.norm(want) + 0.01


@pytest.mark.parametrize(
    ("length", "heads", "size", "tokens"),
    [(16, 2, 16, 128), (16, 1, 64, 256), (32, 1, 80, 128)],
)
def test_attention_of_captions_of_one_length_equals_float32(length, heads, size, tokens):
    captions = np.broadcast_to(np.arange(tokens) // length, (2, tokens))
    check(captions, heads, size, length)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_attention_of_captions_of_true_lengths_equals_float32(lengths, seed):
    """One row is captions of these lengths as far as they fit, then padding; the other the same from the end."""
    captions = np.repeat(np.arange(len(lengths)), lengths)[:128]
    captions = np.pad(captions, (0, 128 - len(captions)), constant_values=len(lengths))
    check(np.stack([captions, captions[::-1]]), heads=2, size=16, seed=seed)


@pytest.mark.parametrize("tokens", [16, 48, 64, 104])
def test_attention_of_rows_of_less_than_a_register_equals_float32(tokens):
    captions = np.minimum(np.arange(tokens) // 7, tokens // 7 - 1)  # and a longer last one, or padding
    check(np.stack([captions, captions[::-1]]), heads=2, size=16, seed=tokens)


def test_attention_of_captions_across_blocks_of_rows_equals_float32():
    captions = np.repeat(np.arange(3), [100, 60, 96])
    check(captions[None], heads=1, size=32)


def test_attention_of_both_forms_agrees():
    captions = np.broadcast_to(np.arange(128) // 16, (2, 128))
    qkv, *others = operands(2, 16, 128)
    results = [actual(qkv, captions, 2, *others, length) for length in (16, None)]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(
            np.float32(one), np.float32(other), rtol=2**-7, atol=1e-5
        )  # float32 sums differ


def test_attention_ignores_the_tokens_of_other_captions():
    qkv, g, bias = operands(2, 16, 128)
    captions = np.broadcast_to(np.arange(128) // 16, (2, 128))
    changed = qkv.at[:, :, 16:].set(1e4)
    for length in (16, None):
        before, after = (actual(a, captions, 2, g, bias, length) for a in (qkv, changed))
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one[..., :16], other[..., :16])


@pytest.mark.parametrize(
    ("heads", "size", "tokens", "dtype", "reason"),
    [
        (16, 64, 128, "bfloat16", ""),
        (16, 64, 256, "bfloat16", ""),
        (16, 80, 128, "bfloat16", ""),
        (16, 64, 128, "float32", "text.dtype is float32, not bfloat16"),
        (16, 72, 128, "bfloat16", "the head size 72 is not a multiple of 16"),
        (16, 64, 136, "bfloat16", "rows of 136 tokens are not a multiple of 128"),
        (16, 64, 1024, "bfloat16", "a row of 1024 tokens and width 1024 needs 47 MiB of vector memory"),
    ],
)
def test_refusal_names_what_does_not_fit(heads, size, tokens, dtype, reason):
    assert refusal(heads, size, tokens, dtype) == reason
