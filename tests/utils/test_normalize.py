"""One normalization for JAX and NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lit_fast.utils.normalize import normalize


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_normalize_is_equal_for_jax_and_numpy(dtype):
    x = np.random.default_rng(0).normal(size=(5, 3, 16)).astype(dtype)
    want = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    for got in (normalize(x), normalize(jnp.asarray(x)), jax.jit(normalize)(x)):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=3e-7)  # two roundings of values below 1


def test_normalize_of_zero_is_zero():
    assert not normalize(np.zeros((2, 3))).any()
