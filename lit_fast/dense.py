"""Dense layers whose products take bfloat16 and add up in float32, on every kind of processor.

TPUs and GPUs do so by themselves. XLA's CPU backend does it for `a b` and `a b^T` if float32 is asked for; anything
else it works out in float32, at a sixth of the speed where the processor has bfloat16 matrix units (AMX). The third
product of training, `a^T b` for the gradient of the kernel, is therefore given to it as `(I a^T) b`: a product with
the identity turns the smaller of the two over, exactly. A sum over all rows is a product with ones there, as XLA's
own takes several passes.
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows, k = x.shape[: -self.contracted], x.shape[-self.contracted :]
        flat = prod(k), prod(self.features)

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return self.kernel_init(key, flat, jnp.float32).reshape(shape)

        kernel = self.param("kernel", init, (*k, *self.features)).reshape(flat)
        x = x.reshape(-1, flat[0]).astype(self.dtype)
        if self.use_bias:
            y = _affine(x, kernel, self.param("bias", self.bias_init, self.features, jnp.float32).ravel())
        else:
            y = _linear(x, kernel)
        return y.reshape(*rows, *self.features)


@jax.custom_vjp
def _linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[m, k] and float32 [k, n] -> [m, n] in the dtype of x; the gradient of the kernel stays float32."""
    return _dot("mk,kn->mn", x, kernel.astype(x.dtype)).astype(x.dtype)


def _linear_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(x, kernel), (x, kernel)


def _linear_backward(kept: tuple[jax.Array, jax.Array], y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    by_x = _dot("mn,kn->mk", y, kernel.astype(y.dtype)).astype(x.dtype)
    plain = partial(_dot, "mk,mn->kn")
    if x.dtype != jnp.bfloat16:
        return by_x, plain(x, y)
    return by_x, lax.platform_dependent(x, y, cpu=_turned_product, default=plain)


_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`_linear` and a float32 bias [n]."""
    return (_dot("mk,kn->mn", x, kernel.astype(x.dtype)) + bias).astype(x.dtype)


def _affine_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _affine(x, kernel, bias), (x, kernel)


def _affine_backward(
    kept: tuple[jax.Array, jax.Array], y: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    by_bias = lax.platform_dependent(
        y,
        cpu=lambda y: _dot("m,mn->n", jnp.ones(len(y), y.dtype), y),
        default=partial(jnp.sum, axis=0, dtype=jnp.float32),
    )
    return *_linear_backward(kept, y), by_bias


_affine.defvjp(_affine_forward, _affine_backward)


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
