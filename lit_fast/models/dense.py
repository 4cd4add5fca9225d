"""Dense layers, which XLA's CPU backend is given in another form than TPUs and GPUs.

That backend multiplies bfloat16 and adds up in float32, as the others do by themselves, in `a b` and `a b^T` only and
if float32 is asked for; anything else it works out in float32, which is slower where the processor has bfloat16
matrix units (AMX). The third product of training, `a^T b` for the gradient of the kernel, is therefore given to it as
`(I a^T) b`: a product with the identity turns the smaller of the two over, exactly. A sum over all rows is a product
with ones there, as XLA's own takes several passes. TPUs get the axes as they are: flattened heads would be copied.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


class Dense(nn.Module):
    """`x kernel + bias` over the last axes: [..., *k] -> [..., *features] in `dtype`.

    kernel float32 [*k, *features] and bias float32 [*features], named and initialised as by Flax's `Dense` and
    `DenseGeneral`.
    """

    features: tuple[int, ...]
    contracted: int = 1  # axes of x
    dtype: Any = jnp.float32
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros
    # To be called under vmap: JAX's own gradient of a kernel is summed over the axis at once, ours would be made
    # for each element first.
    mapped: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        k = x.shape[-self.contracted :]

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return self.kernel_init(key, (prod(k), prod(self.features)), jnp.float32).reshape(shape)

        kernel = self.param("kernel", init, (*k, *self.features))
        bias = self.param("bias", self.bias_init, self.features, jnp.float32) if self.use_bias else None
        affine = _plain if self.mapped else _affine
        return affine(self.contracted, x.astype(self.dtype), kernel, bias)


Bias = jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(contracted: int, x: jax.Array, kernel: jax.Array, bias: Bias) -> jax.Array:
    """[..., *k], float32 [*k, *n] and float32 [*n] -> [..., *n] in the dtype of x."""
    forms = {"cpu": _flat, "default": _plain}
    return lax.platform_dependent(x, kernel, bias, **{k: partial(f, contracted) for k, f in forms.items()})


def _affine_forward(
    contracted: int, x: jax.Array, kernel: jax.Array, bias: Bias
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Bias]]:
    return _affine(contracted, x, kernel, bias), (x, kernel, bias)


def _affine_backward(
    contracted: int, kept: tuple[jax.Array, jax.Array, Bias], y: jax.Array
) -> tuple[jax.Array, jax.Array, Bias]:
    forms = {"cpu": _flat_gradients, "default": _plain_gradients}
    return lax.platform_dependent(y, *kept, **{k: partial(f, contracted) for k, f in forms.items()})


_affine.defvjp(_affine_forward, _affine_backward)


def _plain(contracted: int, x: jax.Array, kernel: jax.Array, bias: Bias) -> jax.Array:
    last = tuple(range(x.ndim - contracted, x.ndim))
    y = lax.dot_general(x, kernel.astype(x.dtype), ((last, tuple(range(contracted))), ((), ())))
    return y if bias is None else y + bias.astype(x.dtype)


def _plain_gradients(
    contracted: int, y: jax.Array, x: jax.Array, kernel: jax.Array, bias: Bias
) -> tuple[jax.Array, jax.Array, Bias]:
    """Of `_plain`, by the gradient of its result."""
    (by_x,) = jax.linear_transpose(lambda x: _plain(contracted, x, kernel, None), x)(y)
    (by_kernel,) = jax.linear_transpose(lambda kernel: _plain(contracted, x, kernel, None), kernel)(y)
    rows = tuple(range(x.ndim - contracted))
    return by_x, by_kernel, None if bias is None else y.sum(axis=rows, dtype=jnp.float32)


def _flat(contracted: int, x: jax.Array, kernel: jax.Array, bias: Bias) -> jax.Array:
    """`_plain` for the CPU backend."""
    k, n = kernel.shape[:contracted], kernel.shape[contracted:]
    y = _dot("mk,kn->mn", x.reshape(-1, prod(k)), kernel.reshape(prod(k), prod(n)).astype(x.dtype))
    y = y if bias is None else y + bias.ravel()
    return y.astype(x.dtype).reshape(*x.shape[: x.ndim - contracted], *n)


def _flat_gradients(
    contracted: int, y: jax.Array, x: jax.Array, kernel: jax.Array, bias: Bias
) -> tuple[jax.Array, jax.Array, Bias]:
    """Of `_flat`, likewise; those of kernel and bias are never rounded to bfloat16."""
    inner = prod(kernel.shape[:contracted])
    shape, x, y = x.shape, x.reshape(-1, inner), y.reshape(-1, kernel.size // inner)
    by_x = _dot("mn,kn->mk", y, kernel.reshape(inner, -1).astype(y.dtype)).astype(x.dtype)
    by_kernel = _turned_product(x, y) if x.dtype == jnp.bfloat16 else _dot("mk,mn->kn", x, y)
    by_bias = None if bias is None else _dot("m,mn->n", jnp.ones(len(y), y.dtype), y).reshape(bias.shape)
    return by_x.reshape(shape), by_kernel.reshape(kernel.shape), by_bias


def _turned_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x^T y`: bfloat16 [m, k] and [m, n] -> float32 [k, n]."""
    if x.shape[1] <= y.shape[1]:
        return _dot("km,mn->kn", _turned(x), y)
    z = _dot("nm,mk->nk", _turned(y), x)
    # In two halves: XLA would take a whole transposition into the product, which it cannot work out then.
    half = len(z) // 2
    return jnp.concatenate([z[:half].T, z[half:].T], axis=1)


def _turned(x: jax.Array) -> jax.Array:
    return _dot("kj,mj->km", jnp.eye(x.shape[1], dtype=x.dtype), x).astype(x.dtype)
