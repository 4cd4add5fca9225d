"""The training pass of the image tower: the embeddings of a device's images, differentiable by the parameters."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.config import Config
from lit_fast.losses.pairs import apply_head
from lit_fast.models.attention import xla_attention
from lit_fast.models.encoder_layers import EncoderLayers
from lit_fast.models.encoder_pass import KEPT, EncoderPass
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.two_towers import Params, image_head, image_tower_params
from lit_fast.utils.normalize import normalize


def embed_pixels(
    image: ImageTower, config: Config, params: Params, pixels: jax.Array, platform: str
) -> jax.Array:
    """Embed this device's images, with the image head if there is one.

    Args:
      image: the tower.
      config: has the microbatches, and which residuals are stored.
      params: see `lit_fast.models.two_towers`.
      pixels: uint8 [n, size, size, 3].
      platform: of the devices, "cpu", "tpu" or "gpu".

    Returns:
      Normalized embeddings float32 [n, width].
    """
    image = trainable(image, config.image.keep, platform)
    head, mean = image_head(params), lax.stop_gradient(params["mean"])
    rows = len(pixels) // config.image.microbatches

    def embed(number: int | jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(pixels, number * rows, rows)
        embeddings = normalize(image.features(image_tower_params(params), part) - mean)
        return embeddings if head is None else apply_head(embeddings, head, config.loss.precision)

    if config.image.keep == "embeddings":  # the backward pass of a microbatch computes it again (GradCache)
        embed = jax.checkpoint(embed)
    if config.image.microbatches == 1:
        return embed(0)
    embeddings = lax.map(embed, jnp.arange(config.image.microbatches))
    return embeddings.reshape(len(pixels), -1)


def trainable(image: ImageTower, keep: str, platform: str) -> ImageTower:
    """Return the tower with an encoder that is differentiated layer by layer.

    Args:
      image: the tower.
      keep: what layers store for the backward pass; "embeddings": that of "products", in one microbatch at a time.
      platform: of the devices, "cpu", "tpu" or "gpu".
    """
    a = image.architecture
    encoder = EncoderPass(
        shape=a.shape,
        gelu=a.gelu,
        epsilon=a.epsilon,
        dropout=0.0,
        dtype=jnp.dtype(image.dtype),
        keep=keep if keep in KEPT else "products",
        platform=platform,
        attention=xla_attention(a.shape.heads, joined=platform != "tpu"),
    )
    return replace(image, layers=EncoderLayers(encoder))
