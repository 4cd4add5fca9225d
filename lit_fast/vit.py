"""The vision transformer that embeds images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_fast.transformer import Encoder
from lit_fast.variants import Shape


class ViT(nn.Module):
    """ViT without a head: the pooled vector after the final LayerNorm.

    images: float [n, size, size, 3], already normalised -> float32 [n, width]. `pool` is "tok" (class
    token) or "gap" (mean of the patch tokens, no class token). The positional embedding covers the
    patches only and is added before the class token is put in front (big_vision, models/vit.py).
    """

    shape: Shape
    patch: int
    pool: str = "tok"
    gelu: str = "exact"
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        width = self.shape.width
        x = nn.Conv(
            width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            name="embedding",
        )(images.astype(self.dtype))
        n, h, w, _ = x.shape
        x = x.reshape(n, h * w, width)
        init = nn.initializers.normal(stddev=width**-0.5)
        x = x + self.param("pos_embedding", init, (1, h * w, width), jnp.float32).astype(self.dtype)
        if self.pool == "tok":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, width), jnp.float32).astype(self.dtype)
            x = jnp.concatenate([jnp.tile(cls, (n, 1, 1)), x], axis=1)
        x = Encoder(self.shape, self.gelu, self.epsilon, dtype=self.dtype, name="Transformer")(x)
        return x[:, 0] if self.pool == "tok" else x.mean(axis=1)
