"""Dense layers with a formulation of their own for XLA's CPU backend.

That backend multiplies bfloat16 with float32 sums only in `a b` and `a b^T`, and only if float32 output is requested.
It computes anything else in float32, which is slower on processors that multiply bfloat16. The gradient of the kernel,
`a^T b`, is therefore a product with an operand that was transposed in memory. TPUs and GPUs get the plain form, whose
heads stay separate axes: flattening would copy them.
"""

from __future__ import annotations

from functools import partial
from math import gcd, prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

Bias = jax.Array | None

_BLOCK = 16  # rows that are transposed at a time


class Dense(nn.Module):
    """`x kernel + bias` over the last axes: [..., *k] -> [..., *features] in `dtype`.

    Parameters are named and initialized as by Flax's `Dense` and `DenseGeneral`: kernel float32 [*k, *features] and
    bias float32 [*features].
    """

    features: tuple[int, ...]
    num_input_axes: int = 1  # the length of k
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k = x.shape[-self.num_input_axes :]

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return self.kernel_init(key, (prod(k), prod(self.features)), jnp.float32).reshape(shape)

        kernel = self.param("kernel", init, (*k, *self.features))
        bias = self.param("bias", self.bias_init, self.features, jnp.float32) if self.use_bias else None
        return _affine(self.num_input_axes, x.astype(self.dtype), kernel, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(num_input_axes: int, x: jax.Array, kernel: jax.Array, bias: Bias) -> jax.Array:
    """Compute [..., *n] in the dtype of x from x [..., *k], kernel float32 [*k, *n] and bias float32 [*n]."""
    forms = partial(_flat, num_input_axes), partial(_plain, num_input_axes)
    return lax.platform_dependent(x, kernel, bias, cpu=forms[0], default=forms[1])


def _affine_forward(
    num_input_axes: int, x: jax.Array, kernel: jax.Array, bias: Bias
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Bias]]:
    return _affine(num_input_axes, x, kernel, bias), (x, kernel, bias)


def _affine_backward(
    num_input_axes: int, residuals: tuple[jax.Array, jax.Array, Bias], dy: jax.Array
) -> tuple[jax.Array, jax.Array, Bias]:
    forms = partial(_flat_gradients, num_input_axes), partial(_plain_gradients, num_input_axes)
    return lax.platform_dependent(dy, *residuals, cpu=forms[0], default=forms[1])


_affine.defvjp(_affine_forward, _affine_backward)


def _plain(num_input_axes: int, x: jax.Array, kernel: jax.Array, bias: Bias) -> jax.Array:
    last = tuple(range(x.ndim - num_input_axes, x.ndim))
    y = lax.dot_general(x, kernel.astype(x.dtype), ((last, tuple(range(num_input_axes))), ((), ())))
    return y if bias is None else y + bias.astype(x.dtype)


def _plain_gradients(
    num_input_axes: int, dy: jax.Array, x: jax.Array, kernel: jax.Array, bias: Bias
) -> tuple[jax.Array, jax.Array, Bias]:
    """Return the gradients of `_plain` by x, kernel and bias."""
    (dx,) = jax.linear_transpose(lambda x: _plain(num_input_axes, x, kernel, None), x)(dy)
    (dkernel,) = jax.linear_transpose(lambda kernel: _plain(num_input_axes, x, kernel, None), kernel)(dy)
    rows = tuple(range(x.ndim - num_input_axes))
    return dx, dkernel, None if bias is None else dy.sum(axis=rows, dtype=jnp.float32)


def _flat(num_input_axes: int, x: jax.Array, kernel: jax.Array, bias: Bias) -> jax.Array:
    """Compute `_plain` on the CPU backend."""
    k, n = kernel.shape[:num_input_axes], kernel.shape[num_input_axes:]
    y = _einsum("mk,kn->mn", x.reshape(-1, prod(k)), kernel.reshape(prod(k), prod(n)).astype(x.dtype))
    y = y if bias is None else y + bias.ravel()
    return y.astype(x.dtype).reshape(*x.shape[: x.ndim - num_input_axes], *n)


def _flat_gradients(
    num_input_axes: int, dy: jax.Array, x: jax.Array, kernel: jax.Array, bias: Bias
) -> tuple[jax.Array, jax.Array, Bias]:
    """Return the gradients of `_flat`; those of kernel and bias are never rounded to bfloat16."""
    inner = prod(kernel.shape[:num_input_axes])
    shape, x, dy = x.shape, x.reshape(-1, inner), dy.reshape(-1, kernel.size // inner)
    dx = _einsum("mn,kn->mk", dy, kernel.reshape(inner, -1).astype(dy.dtype)).astype(x.dtype)
    dkernel, dbias = kernel_gradient(x, dy)
    return (
        dx.reshape(shape),
        dkernel.reshape(kernel.shape),
        None if bias is None else dbias.reshape(bias.shape),
    )


def kernel_gradient(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of kernel and bias on the CPU backend: [..., k] and [..., n] -> float32 [k, n] and [n]."""
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    kernel = _transposed_product(x, dy) if x.dtype == jnp.bfloat16 else _einsum("mk,mn->kn", x, dy)
    return kernel, dy.sum(axis=0, dtype=jnp.float32)


def _transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute `x^T y`: bfloat16 [m, k] and [m, n] -> float32 [k, n]."""
    (m, k), n = x.shape, y.shape[1]
    if m * k <= m * n + k * n:  # elements to transpose
        return _einsum("km,mn->kn", _transpose(x), y)
    return _transpose(_einsum("nm,mk->nk", _transpose(y), x))


def _transpose(x: jax.Array) -> jax.Array:
    """Transpose [m, k] so that XLA does not fold it into a product, which it would then compute in float32.

    Blocks of rows, as XLA on CPUs goes through the whole matrix for each row of the result. A loop of one block would
    be folded.
    """
    m, k = x.shape
    bits = lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
    if m % _BLOCK or m < 2 * _BLOCK:
        columns = gcd(k, 32)
        bits = lax.optimization_barrier(bits.reshape(m, k // columns, columns).transpose(1, 2, 0)).reshape(
            k, m
        )
        return lax.bitcast_convert_type(bits, x.dtype)

    def block(i: Any, out: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(bits, i * _BLOCK, _BLOCK)
        return lax.dynamic_update_slice_in_dim(out, rows.T, i * _BLOCK, 1)

    return lax.bitcast_convert_type(
        lax.fori_loop(0, m // _BLOCK, block, lax.empty((k, m), bits.dtype)), x.dtype
    )
