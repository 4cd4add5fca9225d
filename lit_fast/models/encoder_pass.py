"""One layer of the encoder forward and backward, for training: the function of `transformer.EncoderBlock`.

Autodiff of the Flax module stores and copies more than the backward pass needs, and cannot use what follows. The Flax
modules remain the definition, which the tests compare with.

A layer, without dropout, of rows x of the width d:

    u = LN(x) Wu + bu                 queries, keys and values
    r = x + attention(u) Wo + bo
    h = LN(r) W0 + b0
    y = r + gelu(h) W1 + b1

LayerNorm and the product after it are one operation here. With z = (x - mean) rstd, LN(x) = z gamma + beta and

    LN(x) W + b = z W' + b'           W' = gamma W less the mean of each column,   b' = b + beta W
                = rstd (x W') + b'    on TPUs: the sums of W' over d are 0, so the mean drops out

The first equation holds because the elements of z add up to 0. W' and b' are computed once a step (`prepare`). Hence
no layer computes gradients of gamma and beta; they follow from those of W' and b', once a step (`gradients`):

    dW' = z^T dy,  db' = sum of dy    over all tokens of the step
    D = dW' less the mean of each column
    dW = gamma D + beta db',   dgamma = row sums of D W,   dbeta = W db',   db = db'

D is the same with x rstd instead of z, as the two differ by a term that is equal for all rows of dW'. The gradient of
x: the elements of dz = dy W'^T add up to 0, hence

    dx = rstd (dz - z c)              c = mean(dz z) = sum of dy (y - b') / d

Folding and unfolding read and write all kernels several times. On CPUs, where a step has few tokens for the width of
the tower, kernels stay as they are and every layer applies gamma and beta (`fold_pays`).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.models.attention import Attention
from lit_fast.models.dense import kernel_gradient
from lit_fast.models.precision import from_bits, to_bits
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import RowLayout
from lit_fast.models.transformer import ACTIVATIONS, dropout, fold_keys

Tree = dict[str, Any]
Stats = tuple[jax.Array, jax.Array]  # mean and 1 / deviation of each token, float32 [n, tokens]

# What a layer keeps for its backward pass; it computes the rest again. With "stats" are mean and deviation of x and r.
KEPT: dict[str, tuple[str, ...]] = {
    "products": ("x", "u", "r", "h", "stats"),
    "hidden": ("x", "r", "h", "stats"),
    "inputs": ("x",),
}

_NORMS = ("LayerNorm_0", "LayerNorm_1")
_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
_QKV = ("query", "key", "value")


# Up to these tokens per width folding costs more than it saves on CPUs: interpolated between steps of widths 384 and
# 1024 that were timed by hand on an EPYC.
_CPU_TOKENS_PER_WIDTH = 9


def fold_pays(platform: str, tokens: int, width: int) -> bool:
    """Return whether to fold LayerNorms into kernels that a step multiplies with these tokens of a device."""
    return platform != "cpu" or tokens > _CPU_TOKENS_PER_WIDTH * width


@dataclasses.dataclass(frozen=True)
class EncoderPass:
    """The layers of one encoder, on one platform."""

    shape: Shape
    gelu: str  # one of ACTIVATIONS
    epsilon: float
    dropout: float
    dtype: Any
    keep: str  # a key of KEPT
    platform: str  # "cpu", "tpu" or "gpu"
    attention: Attention

    @property
    def _tpu(self) -> bool:
        """Whether sums over the width are products with ones, and 1 / deviation is applied to products."""
        return self.platform == "tpu" and self.dtype == jnp.bfloat16

    @property
    def _summed(self) -> Any:
        """Dtype of what `_mean` adds up: the products with ones need bfloat16 to be fast."""
        return self.dtype if self._tpu else jnp.float32

    # --- the weights of all layers, once a step

    def prepare(self, block: Tree, tokens: int) -> Tree:
        """Return the weights of parameters that are stacked by layer, for a step with these tokens.

        Each is a pair: kernel [layers, k, n] in the dtype of the products, on CPUs its bits, and bias float32
        [layers, n]. "norms" are the parameters of the LayerNorms; () if they are folded into "u" and "h".
        """
        weights = self.arranged(block)
        if fold_pays(self.platform, tokens, self.shape.width):
            norms = [block[name] for name in _NORMS]
            weights["u"] = tuple(self._fold(norms[0], *pair) for pair in weights["u"])
            weights["h"] = self._fold(norms[1], *weights["h"])
            weights["norms"] = ()
        bits = to_bits if self.platform == "cpu" else lambda a: a
        kernels = lambda a: bits(a.astype(self.dtype)) if a.ndim == 3 else a  # noqa: E731
        return jax.tree.map(kernels, weights)

    def arranged(self, block: Tree) -> Tree:
        """Return parameters that are stacked by layer, or their gradients, as `prepare` has them."""
        mlp, out = block[_MLP], block[_ATTENTION]["out"]
        return {
            "u": tuple(self._projections(block)),
            "h": (mlp["Dense_0"]["kernel"], mlp["Dense_0"]["bias"]),
            "out": (_matrix(out["kernel"], self.shape.width), out["bias"]),
            "mlp": (mlp["Dense_1"]["kernel"], mlp["Dense_1"]["bias"]),
            "norms": tuple(block[name] for name in _NORMS),
        }

    def gradients(self, block: Tree, d: Tree) -> Tree:
        """Return the gradients of the parameters, of those of the weights of `prepare`.

        Args:
          block: the parameters, which are read only where the weights are folded.
          d: the gradients of the weights.
        """
        if not d["norms"]:
            d = self._unfold(block, d)
        du: list[Any] = []
        for dkernel, dbias in d["u"]:
            count = dbias.shape[1] // self.shape.width
            du += zip(*(jnp.split(a, count, axis=-1) for a in (dkernel, dbias)), strict=True)
        attention = {
            name: {
                "kernel": dkernel.reshape(len(dkernel), *block[_ATTENTION][name]["kernel"].shape[1:]),
                "bias": dbias.reshape(len(dbias), *block[_ATTENTION][name]["bias"].shape[1:]),
            }
            for name, (dkernel, dbias) in zip((*_QKV, "out"), (*du, d["out"]), strict=True)
        }
        mlp = {
            f"Dense_{i}": dict(zip(("kernel", "bias"), d[name], strict=True))
            for i, name in enumerate(("h", "mlp"))
        }
        return {**dict(zip(_NORMS, d["norms"], strict=True)), _ATTENTION: attention, _MLP: mlp}

    def _unfold(self, block: Tree, d: Tree) -> Tree:
        """Return the gradients of kernels, biases and LayerNorms, of those of folded kernels and biases."""
        du, dnorms = [], []
        for (kernel, _), (dkernel, dbias) in zip(self._projections(block), d["u"], strict=True):
            dkernel, dnorm = _unfold(block[_NORMS[0]], kernel, dkernel, dbias)
            du.append((dkernel, dbias))
            dnorms.append(dnorm)
        dkernel, dnorm = _unfold(block[_NORMS[1]], block[_MLP]["Dense_0"]["kernel"], *d["h"])
        norms = jax.tree.map(lambda *a: sum(a), *dnorms), dnorm
        return d | {"u": tuple(du), "h": (dkernel, d["h"][1]), "norms": norms}

    def _projections(self, block: Tree) -> list[tuple[jax.Array, jax.Array]]:
        """Return kernels [layers, width, n] and biases [layers, n]: joined one pair, else three."""
        pairs = [block[_ATTENTION][name] for name in _QKV]
        # No -1 in these shapes: a tower of one layer scans none.
        kernels = [p["kernel"].reshape(*p["kernel"].shape[:2], self.shape.width) for p in pairs]
        biases = [p["bias"].reshape(len(p["bias"]), self.shape.width) for p in pairs]
        if not self.attention.joined:
            return list(zip(kernels, biases, strict=True))
        return [(jnp.concatenate(kernels, axis=2), jnp.concatenate(biases, axis=1))]

    def _fold(self, norm: Tree, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = kernel * norm["scale"][:, :, None]
        scaled -= scaled.mean(axis=1, keepdims=True)
        return scaled, bias + _exact("lw,lwk->lk", norm["bias"], kernel)

    # --- one layer

    def forward(
        self, weights: Tree, x: jax.Array, layout: RowLayout, keys: jax.Array | None
    ) -> tuple[jax.Array, Tree]:
        """Return the output of a layer and what is kept of it, but for x.

        Args:
          weights: of this layer, from `prepare`.
          x: [n, tokens, width], the input of the layer.
          layout: of the rows.
          keys: PRNG keys [n] of this layer; None: no dropout.
        """
        weights = jax.tree.map(from_bits, weights)
        stats = self._stats(x)
        u = self._project(weights, x, stats)
        r = self._residual(weights, x, u, layout, keys)
        after = self._stats(r)
        h = self._norm_product(r, after, weights["h"], _norm(weights, 1))
        y = self._affine(self._activated(h, keys), weights["mlp"])
        y = self._add(r, dropout(y, self.dropout, fold_keys(keys, 2)))
        kept = {"u": u, "r": r, "h": h, "stats": (stats, after)}
        return y, {name: kept[name] for name in KEPT[self.keep] if name != "x"}

    def backward(
        self,
        weights: Tree,
        x: jax.Array,
        kept: Tree,
        dy: jax.Array,
        layout: RowLayout,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, Tree]:
        """Return the gradient of x, and float32 gradients of the weights; arguments as of `forward`."""
        weights = jax.tree.map(from_bits, weights)
        stats, after = kept.get("stats") or (self._stats(x), None)
        u = kept["u"] if "u" in kept else self._project(weights, x, stats)
        r = kept["r"] if "r" in kept else self._residual(weights, x, u, layout, keys)
        after = after or self._stats(r)
        h = kept["h"] if "h" in kept else self._norm_product(r, after, weights["h"], _norm(weights, 1))

        g = dropout(dy, self.dropout, fold_keys(keys, 2))
        da = dropout(self._input_gradient(g, weights["mlp"]), self.dropout, fold_keys(keys, 1))
        dh = self._activation_gradient(h, da)
        d: Tree = {
            "mlp": self._kernel_gradients(self._activated(h, keys), g),
            "h": self._kernel_gradients(self._normed(r, after, _norm(weights, 1)), dh),
        }
        dz = self._input_gradient(dh, weights["h"]).astype(self.dtype)
        dr, dnorm = self._norm_gradient(r, after, dz, None, _norm(weights, 1))
        dr = self._add(dy, dr)

        g = dropout(dr, self.dropout, fold_keys(keys, 0))
        bias = jnp.concatenate([bias for _, bias in weights["u"]])
        dattended = self._input_gradient(g, weights["out"]).astype(self.dtype)
        du, attended, c = self.attention.backward(u, dattended, layout, bias)
        d["out"] = self._kernel_gradients(attended, g)
        z = self._normed(x, stats, _norm(weights, 0))
        d["u"] = tuple(self._kernel_gradients(z, a, self._tpu and self.attention.joined) for a in du)
        dz = jnp.zeros((), jnp.float32)
        for a, w in zip(du, weights["u"], strict=True):
            dz += self._input_gradient(a, w)
        dz = dz if c is not None else dz.astype(self.dtype)
        dx, dfirst = self._norm_gradient(x, stats, dz, c, _norm(weights, 0))
        d["norms"] = (dfirst, dnorm) if weights["norms"] else ()
        return self._add(dr, dx), d

    def _project(self, weights: Tree, x: jax.Array, stats: Stats) -> tuple[jax.Array, ...]:
        return tuple(self._norm_product(x, stats, w, _norm(weights, 0)) for w in weights["u"])

    def _residual(
        self, weights: Tree, x: jax.Array, u: tuple[jax.Array, ...], layout: RowLayout, keys: jax.Array | None
    ) -> jax.Array:
        y = self._affine(self.attention.forward(u, layout), weights["out"])
        return self._add(x, dropout(y, self.dropout, fold_keys(keys, 0)))

    def _add(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(self.dtype)

    # --- LayerNorm with the product after it

    def _stats(self, x: jax.Array) -> Stats:
        mean = self._mean(x)
        deviation = x.astype(jnp.float32) - mean[..., None]
        return mean, lax.rsqrt(
            self._mean((deviation * deviation).astype(self.dtype if self._tpu else jnp.float32))
            + self.epsilon
        )

    def _mean(self, x: jax.Array) -> jax.Array:
        """Return the means over the width, float32 [n, tokens]."""
        if not self._tpu:
            return x.mean(axis=-1, dtype=jnp.float32)
        # The matrix unit is idle in sums of vectors, and needs columns in the number of lanes.
        return _product(x, jnp.ones((x.shape[-1], 128), x.dtype))[..., 0] / x.shape[-1]

    def _normed(self, x: jax.Array, stats: Stats, norm: Tree | None) -> jax.Array:
        """Return the operand of the product: LN(x), or where it is folded z, on TPUs with the mean, which drops out."""
        mean, rstd = (a[..., None] for a in stats)
        x = x.astype(jnp.float32)
        z = (x if self._tpu else x - mean) * rstd
        return (z if norm is None else z * norm["scale"] + norm["bias"]).astype(self.dtype)

    def _norm_product(
        self, x: jax.Array, stats: Stats, weights: tuple[jax.Array, jax.Array], norm: Tree | None
    ) -> jax.Array:
        if not self._tpu:
            return self._affine(self._normed(x, stats, norm), weights).astype(self.dtype)
        return (_product(x, weights[0]) * stats[1][..., None] + weights[1]).astype(self.dtype)

    def _norm_gradient(
        self, x: jax.Array, stats: Stats, dz: jax.Array, c: jax.Array | None, norm: Tree | None
    ) -> tuple[jax.Array, Tree]:
        """Return the gradient of x by way of LayerNorm, float32, and those of its parameters if it is not folded."""
        mean, rstd = (a[..., None] for a in stats)
        z, dz = (x.astype(jnp.float32) - mean) * rstd, dz.astype(jnp.float32)
        if norm is None:
            if c is None:
                c = self._mean((dz * z).astype(self._summed))
            return rstd * (dz - z * c[..., None]), {}
        dnorm = {"scale": (dz * z).sum(axis=(0, 1)), "bias": dz.sum(axis=(0, 1))}
        dz *= norm["scale"]
        return rstd * (dz - self._mean(dz)[..., None] - z * self._mean(dz * z)[..., None]), dnorm

    # --- activation

    def _activated(self, h: jax.Array, keys: jax.Array | None) -> jax.Array:
        y = _gelu(h) if self.gelu == "tanh" else ACTIVATIONS[self.gelu](h)
        return dropout(y, self.dropout, fold_keys(keys, 1))

    def _activation_gradient(self, h: jax.Array, dy: jax.Array) -> jax.Array:
        if self.gelu == "tanh":
            return (dy * _gelu_derivative(h)).astype(self.dtype)
        y, pull = jax.vjp(ACTIVATIONS[self.gelu], h)
        return pull(dy.astype(y.dtype))[0]

    # --- products

    def _affine(self, x: jax.Array, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Return `x kernel + bias`: float32, on GPUs in the dtype of x, as a bias is then part of the product."""
        kernel, bias = weights
        if self.platform == "gpu":
            return lax.dot_general(x, kernel, (((2,), (0,)), ((), ()))) + bias.astype(x.dtype)
        return _product(x, kernel) + bias

    def _input_gradient(self, dy: jax.Array, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
        dtype = dy.dtype if self.platform == "gpu" else jnp.float32
        return lax.dot_general(dy, weights[0], (((2,), (1,)), ((), ())), preferred_element_type=dtype)

    def _kernel_gradients(
        self, x: jax.Array, dy: jax.Array, tokens_last: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Return the gradients of kernel and bias of a product of x, float32.

        With `tokens_last` the kernels for TPUs have written dy with its tokens along the lanes, where sums are slow.
        """
        if tokens_last:
            ones = jnp.ones((8, *dy.shape[:2]), dy.dtype)
            bias = lax.dot_general(ones, dy, (((1, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
            return _kernel_gradient(x, dy)[0], bias[0]
        if self.platform == "cpu":
            return lax.platform_dependent(x, dy, cpu=kernel_gradient, default=_kernel_gradient)
        return _kernel_gradient(x, dy)


_exact = partial(jnp.einsum, precision="highest")


def _norm(weights: Tree, index: int) -> Tree | None:
    """Return the parameters of a LayerNorm that is not folded."""
    return weights["norms"][index] if weights["norms"] else None


def _matrix(kernel: jax.Array, columns: int) -> jax.Array:
    return kernel.reshape(len(kernel), math.prod(kernel.shape[1:]) // columns, columns)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.dot_general(x, kernel, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = lax.dot_general(x, dy, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
    return kernel, dy.sum(axis=(0, 1), dtype=jnp.float32)


def _unfold(norm: Tree, kernel: jax.Array, dkernel: jax.Array, dbias: jax.Array) -> tuple[jax.Array, Tree]:
    """Return the gradients of kernel and LayerNorm, of those of the folded kernel and bias."""
    dkernel = dkernel - dkernel.mean(axis=1, keepdims=True)
    dscale, dshift = (dkernel * kernel).sum(axis=2), _exact("lwk,lk->lw", kernel, dbias)
    dkernel = dkernel * norm["scale"][:, :, None] + norm["bias"][:, :, None] * dbias[:, None]
    return dkernel, {"scale": dscale, "bias": dshift}


# gelu(h) = h / 2 (1 + tanh(h (A + B h^2)))
_A = 0.7978845608028654
_B = 0.044715 * _A


def _gelu(h: jax.Array) -> jax.Array:
    half = h.astype(jnp.float32) * 0.5
    return (half + half * _tanh(h.astype(jnp.float32))[1]).astype(h.dtype)


def _gelu_derivative(h: jax.Array) -> jax.Array:
    h = h.astype(jnp.float32)
    square, tanh = _tanh(h)
    half = 0.5 + 0.5 * tanh
    return half + (half - half * tanh) * (h * (_A + (3 * _B) * square))


def _tanh(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    square = h * h
    return square, jnp.tanh(h * (_A + _B * square))
