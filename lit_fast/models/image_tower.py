"""A trained vision tower: the ViT with its pixels' normalization, as a pure function of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lit_fast.config import ImageConfig
from lit_fast.models.architecture import Architecture, from_record
from lit_fast.models.precision import matmul_precision, resolve_dtype
from lit_fast.models.transformer import Layers
from lit_fast.models.vit import ViT

Channels = tuple[float, float, float]


def normalize_pixels(pixels: jax.Array, mean: Channels, std: Channels) -> jax.Array:
    """Return `(pixels / 255 - mean) / std`, float32, of uint8 [n, size, size, 3]."""
    shift, scale = (np.asarray(v, np.float32) for v in (mean, std))
    return (pixels.astype(jnp.float32) / 255.0 - shift) / scale


@dataclass(frozen=True)
class ImageTower:
    """A vision tower without its parameters.

    Attributes:
      architecture: of the ViT.
      size: height and width of the images, pixels.
      mean, std: per channel, of pixels scaled to [0, 1].
      dtype: of the matrix products; parameters are float32.
      layers: of `lit_fast.models.transformer.Encoder`.
    """

    architecture: Architecture
    size: int
    mean: Channels
    std: Channels
    dtype: Any = jnp.float32
    layers: Layers | None = None

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return self.architecture.width

    @property
    def _model(self) -> ViT:
        return ViT(self.architecture, self.dtype, self.layers)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Return random parameters, float32, initialized as in big_vision."""
        images = jnp.zeros((1, self.size, self.size, 3), jnp.float32)
        return jax.jit(self._model.init)(key, images)["params"]  # type: ignore[no-any-return]

    def features(self, params: dict[str, Any], pixels: jax.Array) -> jax.Array:
        """Compute the features, float32 [n, width], of images uint8 [n, size, size, 3]."""
        images = normalize_pixels(pixels, self.mean, self.std)
        with matmul_precision(self.dtype):
            return self._model.apply({"params": params}, images)  # type: ignore[return-value]


def image_tower(record: dict[str, Any], config: ImageConfig) -> ImageTower:
    """Make the tower that the `tower.json` of a run records.

    Raises:
      KeyError, TypeError, ValueError: a value is missing or invalid.
    """
    preprocess = record["preprocess"]
    return ImageTower(
        architecture=from_record(record),
        size=preprocess["size"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        dtype=jnp.dtype(resolve_dtype(config.dtype)),
    )
