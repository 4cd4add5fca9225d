"""The one transformer encoder, used by image and text towers alike.

Pre-LN, bidirectional, biases everywhere; parameter names as big_vision's, layers stacked on a leading
axis and scanned, which compiles in a fraction of the time of unrolled layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lit_fast.models.dense import Dense
from lit_fast.models.sizes import Shape

# What a layer may keep for the backward pass, by name.


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: jax.Array, name: str) -> jax.Array:
    """`x`, which `jax.checkpoint_policies.save_only_these_names` knows by this name.

    bfloat16 is kept as its bits: XLA's CPU backend takes a layer's slice of a bfloat16 stack by converting the whole
    stack to float32, which triples the memory.
    """
    return _kept(x, name)


@kept.defjvp
def _(name: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _kept(primals[0], name), tangents[0]


def _kept(x: jax.Array, name: str) -> jax.Array:
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


# Multi-head attention with the parameter names and shapes of Flax's own.


class MultiHeadDotProductAttention(nn.Module):
    """Every query looks at every key that the mask lets it see.

    queries: [n, q, width], keys: [n, k, width] -> [n, q, width]; mask: bool, broadcastable to
    [n, heads, q, k]. Scores and softmax are float32 whatever `dtype` is.

    Heads lie before positions in memory, and the weights are divided by their sum after the product
    with the values: on a CPU this takes a third of the time of `nn.MultiHeadDotProductAttention`.
    """

    heads: int
    dtype: Any = jnp.float32
    mapped: bool = False  # as of `Dense`

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = queries.shape[-1]
        size = width // self.heads
        dense = partial(
            Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), mapped=self.mapped
        )
        product = lambda name, x: kept(dense((self.heads, size), name=name)(x), "qkv")  # noqa: E731
        q = product("query", queries).swapaxes(1, 2) * size**-0.5
        k = product("key", keys).swapaxes(1, 2)
        v = product("value", keys).swapaxes(1, 2)
        scores = jnp.einsum("nhqd,nhkd->nhqk", q, k, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        weights = weights.astype(self.dtype)
        total = weights.sum(axis=-1, keepdims=True, dtype=jnp.float32)
        y = jnp.einsum("nhqk,nhkd->nhqd", weights, v, preferred_element_type=jnp.float32) / total
        y = kept(y.astype(self.dtype).swapaxes(1, 2), "attended")
        return dense((width,), contracted=2, name="out")(y)


def swiglu(x: jax.Array) -> jax.Array:
    """SiLU of the first half gates the second: [..., 2 n] -> [..., n] (DINOv2, layers/swiglu_ffn.py)."""
    gate, value = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * value


def gelu(x: jax.Array) -> jax.Array:
    """`x / 2 (1 + erf(x / sqrt 2))` in float32, as torch; `jax.nn.gelu`'s erfc is slower on a CPU."""
    half = x.astype(jnp.float32) * 0.5
    return (half + half * jax.lax.erf(x.astype(jnp.float32) * 0.5**0.5)).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation, in float32."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


# "quick" is OpenAI CLIP's approximation.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exact": gelu,
    "tanh": gelu_tanh,
    "quick": lambda x: x * nn.sigmoid(1.702 * x),
    "swiglu": swiglu,
}


# What a layer keeps for the backward pass, by name. "hidden" does without queries, keys and
# values, a quarter of a layer's work for two fifths of the memory; what attention makes of them costs little.
KEEP: dict[str, tuple[str, ...]] = {
    "products": ("input", "qkv", "attended", "residual", "hidden"),
    "hidden": ("input", "residual", "hidden"),
    "inputs": ("input",),
}


class MlpBlock(nn.Module):
    """Dense, non-linearity, dense."""

    mlp_dim: int
    gelu: str  # one of ACTIVATIONS
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        dense = partial(
            Dense,
            dtype=self.dtype,
            mapped=self.dropout > 0,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(stddev=1e-6),
        )
        width = x.shape[-1]
        x = dense((self.mlp_dim * (2 if self.gelu == "swiglu" else 1),), name="Dense_0")(x)
        x = ACTIVATIONS[self.gelu](kept(x, "hidden"))
        x = nn.Dropout(self.dropout)(x, deterministic)
        return dense((width,), name="Dense_1")(x)


class EncoderBlock(nn.Module):
    """`x + MHA(LN(x))`, then `x + MLP(LN(x))`, for all positions or for some of each sequence.

    x: [n, length, width] -> [n, length, width], or [n, k, width] with `position` int [n, k]: the last layer
    is needed at the pooled positions only, so there its queries and MLP are worked out for these instead of
    all.
    """

    shape: Shape
    gelu: str
    epsilon: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, deterministic: bool, position: jax.Array | None = None
    ) -> jax.Array:
        x = kept(x, "input")
        # Two-pass variance: the reference implementations' features are met to 1e-5 only with it.
        norm = partial(nn.LayerNorm, epsilon=self.epsilon, use_fast_variance=False)
        keys = queries = norm()(x)
        if position is not None:
            x, queries = (jnp.take_along_axis(a, position[:, :, None], axis=1) for a in (x, keys))
            if mask is not None and mask.shape[2] > 1:
                mask = jnp.take_along_axis(mask, position[:, None, :, None], axis=2)
        y = MultiHeadDotProductAttention(self.shape.heads, self.dtype, self.dropout > 0)(queries, keys, mask)
        x = kept(x + nn.Dropout(self.dropout)(y, deterministic), "residual")
        y = MlpBlock(self.shape.mlp_dim, self.gelu, self.dropout, self.dtype)(norm()(x), deterministic)
        x = x + nn.Dropout(self.dropout)(y, deterministic)
        return x.astype(self.dtype)


class Encoder(nn.Module):
    """`depth` blocks and, if `final_norm`, a LayerNorm.

    x: [n, length, width] -> float32 [n, length, width], or [n, k, width] with `position` int [n, k]: the
    output at some positions of each sequence. mask: bool, broadcastable to [n, heads, queries, length], true
    where a query may look. `keep` says what the layers keep for the backward pass: "everything" or what a
    key of `KEEP` says.
    """

    shape: Shape
    gelu: str = "tanh"
    epsilon: float = 1e-6
    dropout: float = 0.0
    keep: str = "everything"
    dtype: Any = jnp.float32
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        deterministic: bool = True,
        position: jax.Array | None = None,
    ) -> jax.Array:
        shape, x = self.shape, x.astype(self.dtype)
        block = EncoderBlock(shape, self.gelu, self.epsilon, self.dropout, self.dtype, parent=None)

        def init(key: jax.Array) -> Any:
            one = lambda key: block.init(key, x[:1], None, True)["params"]  # noqa: E731
            return jax.vmap(one)(jax.random.split(key, shape.depth))

        params = self.param("encoderblock", init)
        noisy = self.dropout > 0 and not deterministic
        keys = jax.random.split(self.make_rng("dropout"), shape.depth) if noisy else None

        def layer(x: jax.Array, given: tuple[Any, Any], position: jax.Array | None = None) -> jax.Array:
            rngs = None if given[1] is None else {"dropout": given[1]}
            return block.apply({"params": given[0]}, x, mask, deterministic, position, rngs=rngs)  # type: ignore[return-value]

        if self.keep != "everything":
            policy = jax.checkpoint_policies.save_only_these_names(*KEEP[self.keep])
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
        # The last layer is not scanned where it does less than the others.
        scanned = shape.depth - (position is not None)
        part = lambda index: jax.tree.map(lambda a: a[index], (params, keys))  # noqa: E731
        x, _ = jax.lax.scan(lambda x, given: (layer(x, given), None), x, part(slice(scanned)))
        if position is not None:
            x = layer(x, part(-1), position)
        if not self.final_norm:
            return x.astype(jnp.float32)
        norm = nn.LayerNorm(
            epsilon=self.epsilon, use_fast_variance=False, dtype=jnp.float32, name="encoder_norm"
        )
        return norm(x)


# Multi-head attention pooling, used by image and text towers alike.


class MAPHead(nn.Module):
    """A learned query looks at all tokens (big_vision, models/vit.py), or at several parts of them.

    x: [n, length, width] -> [n, k, width]; mask: bool, broadcastable to [n, heads, k, length], true where the
    query may look; without one, k is 1.
    """

    shape: Shape
    gelu: str
    epsilon: float
    dtype: Any
    dropout: float = 0.0  # of the tower; the head has none itself

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width, _, mlp_dim, heads = self.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32)
        x = x.astype(self.dtype)
        queries = 1 if mask is None else mask.shape[2]
        probe = jnp.tile(probe.astype(self.dtype), (x.shape[0], queries, 1))
        x = MultiHeadDotProductAttention(heads, self.dtype, self.dropout > 0)(probe, x, mask)
        y = nn.LayerNorm(epsilon=self.epsilon, use_fast_variance=False)(x)
        return x + MlpBlock(mlp_dim, self.gelu, self.dropout, self.dtype)(y, True)
