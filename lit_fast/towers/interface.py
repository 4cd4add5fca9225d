"""A frozen vision tower as the stages see it, whatever computes it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lit_fast.models.image_tower import normalize_pixels
from lit_fast.models.precision import matmul_precision
from lit_fast.towers.preprocess import Preprocess
from lit_fast.version import __version__
from lit_fast.weights.parameters import Params


@dataclass(frozen=True)
class FrozenTower(ABC):
    """A frozen vision tower: weights, preprocessing and a function of them.

    Attributes:
      name: default name of the feature directory.
      source: the argument of `load_tower`, as an absolute path or a name.
      sha256: digest of the weights; of several parts, a digest of their digests.
      preprocess: from the bytes of an image to pixels.
      params: numpy arrays, the first argument of `embed`.
    """

    name: str
    source: str
    sha256: str
    preprocess: Preprocess
    params: Params

    @property
    @abstractmethod
    def width(self) -> int:
        """Return the length of a feature vector."""

    @property
    def stored_params(self) -> Params:
        """Return the float32 arrays that an exported directory stores."""
        return self.params

    @property
    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that compute the features."""
        return {"lit_fast": __version__, "jax": jax.__version__}

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return everything that affects the features, but for the dtype."""

    @abstractmethod
    def features(self, params: Params, images: jax.Array, dtype: Any) -> jax.Array:
        """Compute features of any float type [n, width] of normalized images float32 [n, size, size, 3]."""

    def embed(self, params: Params, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Compute the features of images; a pure function for `jax.jit`.

        Args:
          params: those of the tower, on the devices.
          images: uint8 [n, size, size, 3].
          dtype: precision of the matrix products; LayerNorm statistics and softmax are float32.

        Returns:
          float32 [n, width].
        """
        x = normalize_pixels(images, self.preprocess.mean, self.preprocess.std)
        with matmul_precision(dtype):
            return self.features(params, x, dtype).astype(jnp.float32)

    def provenance(self, dtype: str) -> dict[str, Any]:
        """Return the content of `tower.json`; `identity` is a digest of everything that affects the features."""
        record = self.record() | {"dtype": dtype}
        text = json.dumps(record, sort_keys=True).encode()
        return {
            "name": self.name,
            "source": self.source,
            "identity": hashlib.blake2b(text, digest_size=16).hexdigest(),
            **record,
            "versions": self.versions,
        }
