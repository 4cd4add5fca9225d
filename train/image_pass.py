"""The training pass of the image tower: the embeddings of a device's images, differentiable by the parameters."""

from __future__ import annotations

from collections.abc import Callable
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

    def embed(pixels: jax.Array) -> jax.Array:
        embeddings = normalize(image.features(image_tower_params(params), pixels) - mean)
        return embeddings if head is None else apply_head(embeddings, head, config.loss.precision)

    recompute = config.image.keep == "embeddings"
    return map_microbatches(embed, {"pixels": pixels}, config.image.microbatches, recompute)


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


def map_microbatches(
    function: Callable[..., jax.Array], inputs: dict[str, jax.Array], microbatches: int, recompute: bool
) -> jax.Array:
    """Apply `function(**inputs)` to equal parts of the inputs, one after another.

    Args:
      function: from arrays [rows, ...] to an array [outputs, ...], each output of one row.
      inputs: arrays [n, ...]; n is divisible by `microbatches`.
      microbatches: number of parts.
      recompute: store no residuals of a part; its backward pass computes the part again (GradCache).

    Returns:
      The outputs of all parts, concatenated.
    """
    if recompute:
        function = jax.checkpoint(function)
    if microbatches == 1:
        return function(**inputs)
    parts = jax.tree.map(lambda a: a.reshape(microbatches, -1, *a.shape[1:]), inputs)
    outputs = lax.map(lambda part: function(**part), parts)
    return outputs.reshape(-1, *outputs.shape[2:])
