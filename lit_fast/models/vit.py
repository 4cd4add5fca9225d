"""The vision transformer that embeds images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.models.architecture import Architecture
from lit_fast.models.dense import Dense
from lit_fast.models.transformer import Encoder, LayerNorm, Layers, MAPHead


class ViT(nn.Module):
    """A ViT without classifier.

    images: float [n, size, size, 3], normalized -> float32 [n, architecture.width]. The positional embedding covers
    the patches only and is added before class and register tokens are prepended; the class token includes its own
    position, if it has one (big_vision, models/vit.py).
    """

    architecture: Architecture
    dtype: Any = jnp.float32
    layers: Layers | None = None  # of the encoder

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        a, width = self.architecture, self.architecture.shape.width
        patch = (a.patch, a.patch)
        embedding = nn.Conv(width, patch, patch, padding="VALID", dtype=self.dtype, name="embedding")
        x = embedding(images.astype(self.dtype))
        n, h, w, _ = x.shape
        x = x.reshape(n, h * w, width)
        init = nn.initializers.normal(stddev=width**-0.5)
        x = x + self.param("pos_embedding", init, (1, h * w, width), jnp.float32).astype(self.dtype)
        front = []
        if a.class_token:
            front.append(self.param("cls", nn.initializers.zeros, (1, 1, width), jnp.float32))
        if a.registers:
            front.append(self.param("registers", init, (1, a.registers, width), jnp.float32))
        if front:
            tokens = jnp.concatenate(front, axis=1).astype(self.dtype)
            x = jnp.concatenate([jnp.tile(tokens, (n, 1, 1)), x], axis=1)
        if a.pre_norm:
            x = LayerNorm(epsilon=a.epsilon, name="pre_norm")(x)
        final_norm = not a.norm_after_pool
        encoder = Encoder(
            a.shape,
            a.gelu,
            a.epsilon,
            layers=self.layers,
            dtype=self.dtype,
            final_norm=final_norm,
            name="Transformer",
        )
        first = None if a.pool in ("gap", "map") else jnp.zeros((n, 1), jnp.int32)
        x = encoder(x, output_positions=first)
        if a.pool == "gap":
            x = x[:, -h * w :].mean(axis=1)
        elif a.pool == "map":
            x = MAPHead(a.shape, a.gelu, a.epsilon, self.dtype)(x[:, -h * w :])[:, 0]
        else:
            x = x[:, 0]
        if a.norm_after_pool:
            x = LayerNorm(epsilon=a.epsilon, dtype=jnp.float32, name="pooled_norm")(x)
        if a.pool == "projection":
            x = Dense((a.projection,), use_bias=False, dtype=self.dtype, name="projection")(x)
        return x.astype(jnp.float32)
