"""The transformer encoder of image and text towers, with attention, MLP, dropout and the MAP head.

Pre-LN, bidirectional, biases everywhere. Parameters have big_vision's names; those of the layers are stacked on a
leading axis and scanned, which compiles several times faster than unrolled layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.models.dense import Dense
from lit_fast.models.sizes import Shape

# --- dropout with a key per row


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zero elements of x [n, ...] with probability `rate` and divide the others by `1 - rate`.

    `keys` are PRNG keys [n], None: no dropout. The mask of a row depends on its own key alone, so it is the same in
    whatever batch, microbatch or device the row is.
    """
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def fold_keys(keys: jax.Array | None, index: int | jax.Array) -> jax.Array | None:
    """Derive the keys [n] of one layer or one use of `dropout` from PRNG keys [n]; None stays None."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)


# --- layers

# Features agree with the reference implementations to 1e-5 only with two-pass variance.
LayerNorm = partial(nn.LayerNorm, use_fast_variance=False)


class MultiHeadDotProductAttention(nn.Module):
    """Multi-head attention with the parameter names and shapes of Flax's own.

    queries: [n, q, width], keys: [n, k, width] -> [n, q, width]; mask: bool, broadcastable to [n, heads, q, k], true
    where a query attends to a key. Scores and softmax are float32 whatever `dtype` is.

    Heads precede positions in memory, and the weights are divided by their sum after the product with the values: on
    a CPU this takes a third of the time of `nn.MultiHeadDotProductAttention`.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = queries.shape[-1]
        size = width // self.heads
        dense = partial(Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())

        def project(name: str, x: jax.Array) -> jax.Array:
            return dense((self.heads, size), name=name)(x).swapaxes(1, 2)

        q, k, v = project("query", queries) * size**-0.5, project("key", keys), project("value", keys)
        scores = jnp.einsum("nhqd,nhkd->nhqk", q, k, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        weights = weights.astype(self.dtype)
        total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
        y = jnp.einsum("nhqk,nhkd->nhqd", weights, v, preferred_element_type=jnp.float32) / total
        return dense((width,), num_input_axes=2, name="out")(y.astype(self.dtype).swapaxes(1, 2))


def swiglu(x: jax.Array) -> jax.Array:
    """Gate the second half by the SiLU of the first: [..., 2 n] -> [..., n] (DINOv2, layers/swiglu_ffn.py)."""
    gate, value = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * value


def gelu(x: jax.Array) -> jax.Array:
    """Compute `x / 2 (1 + erf(x / sqrt 2))` in float32, as torch; `jax.nn.gelu`'s erfc is slower on a CPU."""
    half = x.astype(jnp.float32) * 0.5
    return (half + half * lax.erf(x.astype(jnp.float32) * 0.5**0.5)).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """Compute the tanh approximation of GELU in float32."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


# "quick" is OpenAI CLIP's approximation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exact": gelu,
    "tanh": gelu_tanh,
    "quick": lambda x: x * nn.sigmoid(1.702 * x),
    "swiglu": swiglu,
}


class MlpBlock(nn.Module):
    """Dense, activation, dropout, dense: [n, length, width] -> [n, length, width]."""

    mlp_dim: int
    gelu: str  # one of ACTIVATIONS
    dtype: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        dense = partial(
            Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(stddev=1e-6),
        )
        width = x.shape[-1]
        x = dense((self.mlp_dim * (2 if self.gelu == "swiglu" else 1),), name="Dense_0")(x)
        x = ACTIVATIONS[self.gelu](x)
        x = dropout(x, self.dropout, dropout_keys)
        return dense((width,), name="Dense_1")(x)


class EncoderBlock(nn.Module):
    """`x + MHA(LN(x))`, then `x + MLP(LN(x))`.

    x: [n, length, width] -> [n, length, width], or [n, k, width] with `output_positions` int [n, k]. The last layer's
    queries and MLP are needed at the pooled positions only, so they are computed for these alone.
    """

    shape: Shape
    gelu: str
    epsilon: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        output_positions: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        norm = partial(LayerNorm, epsilon=self.epsilon)
        keys = queries = norm()(x)
        if output_positions is not None:
            x, queries = (jnp.take_along_axis(a, output_positions[:, :, None], axis=1) for a in (x, keys))
            if mask is not None and mask.shape[2] > 1:
                mask = jnp.take_along_axis(mask, output_positions[:, None, :, None], axis=2)
        y = MultiHeadDotProductAttention(self.shape.heads, self.dtype)(queries, keys, mask)
        x = x + dropout(y, self.dropout, fold_keys(dropout_keys, 0))
        mlp = MlpBlock(self.shape.mlp_dim, self.gelu, self.dtype, self.dropout)
        y = mlp(norm()(x), fold_keys(dropout_keys, 1))
        x = x + dropout(y, self.dropout, fold_keys(dropout_keys, 2))
        return x.astype(self.dtype)


Layers = Callable[[Any, jax.Array], jax.Array]
"""(parameters stacked by layer, x [n, length, width]) -> x"""


class Encoder(nn.Module):
    """`depth` blocks and, if `final_norm`, a LayerNorm.

    The layers are one `lax.scan` over the stacked parameters and not `nn.scan(nn.remat(EncoderBlock))`, which always
    runs the whole stack: with `output_positions` the last layer runs outside the loop, with its slice of the stack.
    """

    shape: Shape
    gelu: str = "tanh"
    epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: Any = jnp.float32
    final_norm: bool = True
    layers: Layers | None = None  # in place of the loop over the layers; without masks and dropout

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        output_positions: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Encode x [n, length, width].

        Args:
          x: embedded tokens with positions.
          mask: bool, broadcastable to [n, heads, length, length], true where a query attends to a key.
          output_positions: int [n, k], the positions whose outputs are needed; None: all.
          dropout_keys: PRNG keys [n], one per row; None: no dropout.

        Returns:
          float32 [n, length, width], or [n, k, width] with `output_positions`.
        """
        depth, x = self.shape.depth, x.astype(self.dtype)
        block = EncoderBlock(self.shape, self.gelu, self.epsilon, self.dropout, self.dtype, parent=None)

        def init(key: jax.Array) -> Any:
            return jax.vmap(lambda key: block.init(key, x[:1], None)["params"])(jax.random.split(key, depth))

        stacked = self.param("encoderblock", init)

        def layer(x: jax.Array, params: Any, index: Any, positions: jax.Array | None = None) -> jax.Array:
            keys = fold_keys(dropout_keys, index)
            return block.apply({"params": params}, x, mask, positions, keys)  # type: ignore[return-value]

        num_scanned = depth if output_positions is None else depth - 1
        scanned = jax.tree.map(lambda a: a[:num_scanned], stacked)
        if self.layers is not None:
            x = self.layers(scanned, x)
        else:
            x, _ = lax.scan(
                lambda x, inputs: (layer(x, *inputs), None), x, (scanned, jnp.arange(num_scanned))
            )
        if output_positions is not None:
            x = layer(x, jax.tree.map(lambda a: a[-1], stacked), depth - 1, output_positions)
        if not self.final_norm:
            return x.astype(jnp.float32)
        return LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, name="encoder_norm")(x)


class MAPHead(nn.Module):
    """Multi-head attention pooling: a learned query attends to all tokens (big_vision, models/vit.py).

    x: [n, length, width] -> [n, k, width]; mask: bool, broadcastable to [n, heads, k, length], true where query k
    attends to a token; without a mask, k is 1.
    """

    shape: Shape
    gelu: str
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width, _, mlp_dim, heads = self.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32)
        x = x.astype(self.dtype)
        queries = 1 if mask is None else mask.shape[2]
        probe = jnp.tile(probe.astype(self.dtype), (x.shape[0], queries, 1))
        x = MultiHeadDotProductAttention(heads, self.dtype)(probe, x, mask)
        y = LayerNorm(epsilon=self.epsilon)(x)
        return x + MlpBlock(mlp_dim, self.gelu, self.dtype)(y)
