"""Dense layers against float64, and against Flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_fast.models import dense
from lit_fast.models.dense import Dense

# The relative precision of bfloat16.
EPSILON = 2.0**-8


def products(dtype, m, k, n, use_bias=True):
    """Return output and gradients by x, kernel and bias, by name: (value, dtype, float64 reference)."""
    rng = np.random.default_rng(m * k * n)
    layer = Dense((n,), dtype=dtype, use_bias=use_bias)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    x, y, params = draw(m, k), draw(m, n), {"kernel": draw(k, n)} | ({"bias": draw(n)} if use_bias else {})

    @jax.jit
    def run(params, x):
        out, pull = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x.astype(dtype))
        return out, *pull(y.astype(dtype))

    out, by_params, by_x = run(params, x)
    x, y, kernel = (np.asarray(a, np.float64) for a in (x, y, params["kernel"]))
    bias = np.asarray(params["bias"], np.float64) if use_bias else 0.0
    want = {"out": x @ kernel + bias, "kernel": x.T @ y, "x": y @ kernel.T, "bias": y.sum(axis=0)}
    got = {"out": out, "x": by_x} | by_params
    return {name: (np.asarray(a, np.float64), a.dtype, want[name]) for name, a in got.items()}


@given(
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.integers(1, 33),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)
@example(jnp.bfloat16, 48, 33, 40, True)  # several blocks of rows are transposed
@example(jnp.bfloat16, 48, 40, 5, False)
@settings(deadline=None, max_examples=25)
def test_dense_output_and_gradients_equal_float64(dtype, m, k, n, use_bias):
    for name, (got, kind, want) in products(dtype, m, k, n, use_bias).items():
        scale = np.abs(want).max(initial=1.0)
        if name in ("out", "x"):
            assert kind == dtype
            bound = EPSILON if dtype == jnp.bfloat16 else 1e-6  # rounded once, after sums in float32
        else:  # gradients of parameters are never rounded to bfloat16
            assert kind == jnp.float32
            bound = 1e-6
        np.testing.assert_allclose(got, want, atol=bound * scale, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("num_input_axes", "kernel"), [(1, (6, 2, 5)), (2, (3, 2, 5))])
def test_dense_forms_of_cpu_and_others_agree(dtype, num_input_axes, kernel):
    """The two forms differ by roundings to bfloat16."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, y = (
        draw(4, 7, *kernel[:num_input_axes]).astype(dtype),
        draw(4, 7, *kernel[num_input_axes:]).astype(dtype),
    )
    params = draw(*kernel), draw(*kernel[num_input_axes:])
    epsilon = 4 * EPSILON if dtype == jnp.bfloat16 else 1e-6
    forms = [(dense._plain, dense._plain_gradients), (dense._flat, dense._flat_gradients)]
    plain, flat = (
        jax.tree.leaves((form(num_input_axes, x, *params), gradients(num_input_axes, y, x, *params)))
        for form, gradients in forms
    )
    for a, b in zip(plain, flat, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=epsilon * np.abs(b).max())


@pytest.mark.parametrize(("features", "num_input_axes"), [((12,), 1), ((3, 4), 1), ((12,), 2)])
def test_dense_parameters_equal_flax(features, num_input_axes):
    x = jnp.ones((5, 6, 8))
    ours = Dense(features, num_input_axes, kernel_init=nn.initializers.xavier_uniform())
    flax = nn.DenseGeneral(
        features, axis=tuple(range(-num_input_axes, 0)), kernel_init=nn.initializers.xavier_uniform()
    )
    key = jax.random.key(0)
    params, want = ours.init(key, x), flax.init(key, x)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    np.testing.assert_allclose(ours.apply(params, x), flax.apply(want, x), atol=1e-5)
