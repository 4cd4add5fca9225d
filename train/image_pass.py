"""The training pass of the image tower: the embeddings of a device's images, differentiable by the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
from jax import lax

from lit_fast.config import Config
from lit_fast.losses.pairs import apply_head
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.two_towers import Params, image_head, image_tower_params
from lit_fast.utils.normalize import normalize


def embed_pixels(image: ImageTower, config: Config, params: Params, pixels: jax.Array) -> jax.Array:
    """Embed this device's images, with the image head if there is one.

    Args:
      image: the tower; its remat policy is that of the configuration.
      config: has the microbatches, and which residuals are stored.
      params: see `lit_fast.models.two_towers`.
      pixels: uint8 [n, size, size, 3].

    Returns:
      Normalized embeddings float32 [n, width].
    """
    image = replace(image, remat_policy=config.image.encoder_remat)
    head, mean = image_head(params), lax.stop_gradient(params["mean"])

    def embed(pixels: jax.Array) -> jax.Array:
        embeddings = normalize(image.features(image_tower_params(params), pixels) - mean)
        return embeddings if head is None else apply_head(embeddings, head, config.loss.precision)

    recompute = config.image.keep == "embeddings"
    return map_microbatches(embed, {"pixels": pixels}, config.image.microbatches, recompute)


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
