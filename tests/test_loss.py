"""The frozen ring against the dense formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.loss import Ring, normalize, sigmoid_loss
from lit_fast.mesh import AXIS, make_mesh, on_each_device


def dense(texts, log_scale, bias, images, text_rows, image_rows):
    """Value and gradients by the formula, in float64 NumPy, the whole matrix at once."""
    texts, images = np.float64(texts), np.float64(images)
    scale = np.exp(np.float64(log_scale))
    cosine = images @ texts.T
    label = np.where(image_rows[:, None] == text_rows[None, :], 1.0, -1.0)
    margin = label * (scale * cosine + np.float64(bias))
    n = len(images)
    slope = -label / (1 + np.exp(margin)) / n
    value = np.logaddexp(0, -margin).sum() / n
    return value, (scale * slope.T @ images, (slope * scale * cosine).sum(), slope.sum())


def pairs(seed, n, captions, width):
    rng = np.random.default_rng(seed)
    images = np.asarray(normalize(rng.normal(size=(n, width)).astype(np.float32)))
    texts = np.asarray(normalize(rng.normal(size=(n * captions, width)).astype(np.float32)))
    rows = rng.integers(0, max(1, 3 * n // 4), n).astype(np.int32)  # some images appear twice
    return texts, images, np.repeat(rows, captions), rows


def run(devices, tile, log_scale, bias, texts, images, text_rows, image_rows):
    mesh = make_mesh(jax.devices()[:devices])
    ring = Ring(devices, tile)

    def gradients(texts, log_scale, bias, images, text_rows, image_rows):
        def share(z, t, b):
            return sigmoid_loss(ring, z, t, b, images, text_rows, image_rows)

        value, (z, t, b) = jax.value_and_grad(share, (0, 1, 2))(texts, log_scale, bias)
        value, t, b = jax.lax.psum((value, t, b), AXIS)
        return value, (jax.lax.all_gather(z, AXIS, tiled=True), t, b)

    compute = jax.jit(on_each_device(gradients, mesh, True, False, False, True, True, True))
    return compute(texts, jnp.float32(log_scale), jnp.float32(bias), images, text_rows, image_rows)


@pytest.mark.parametrize("devices", [1, 2, 4])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    per_device=st.integers(1, 9),
    captions=st.integers(1, 3),
    tile=st.integers(1, 12),
    log_scale=st.floats(-1, 4.6),
    bias=st.floats(-12, 3),
)
def test_equals_the_dense_formula(devices, seed, per_device, captions, tile, log_scale, bias):
    args = pairs(seed, per_device * devices, captions, 16)
    value, grads = run(devices, tile, log_scale, bias, *args)
    texts, images, text_rows, image_rows = args
    want, want_grads = dense(texts, np.float32(log_scale), np.float32(bias), images, text_rows, image_rows)
    # float32 sums of up to 36 x 108 terms: rounding is a few 1e-7 of the largest term. exp(log_scale) up
    # to 100 magnifies the rounding of a cosine (6e-8) to 6e-6 in a logit, hence in the relative error.
    np.testing.assert_allclose(value, want, rtol=2e-5, atol=1e-6)
    for got, exact in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=2e-5 * np.abs(exact).max() + 1e-6)


def test_initial_value_of_the_paper():
    """At initialisation with orthogonal embeddings: 10.00005 + (n - 1) * 4.54e-5."""
    n = 64
    images, texts = np.eye(2 * n, dtype=np.float32)[:n], np.eye(2 * n, dtype=np.float32)[n:]
    rows = np.arange(n, dtype=np.int32)
    value, _ = run(4, 7, np.log(10), -10.0, texts, images, rows, rows)
    assert value == pytest.approx(10.00004540 + (n - 1) * 4.539890e-5, rel=1e-6)


def test_several_captions_are_no_negatives():
    """With every pair from one row there is nothing to push apart: the bias gradient is negative."""
    texts, images, _, _ = pairs(0, 4, 2, 8)
    value, (_, _, bias) = run(1, 4, 0.0, 0.0, texts, images, np.zeros(8, np.int32), np.zeros(4, np.int32))
    assert bias < 0
    assert np.isfinite(value)
