"""Features of all images of a dataset by a tower whose weights change, as `lit-fast embed` would store them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lit_fast.data.dataset import Dataset
from lit_fast.data.features import BFLOAT16
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.models.image_tower import ImageTower
from lit_fast.runtime import REPLICATED, SHARDED, batch_sharding, replicated, shard_map
from lit_fast.storage.machine import cpu_count
from lit_fast.towers.embed import default_batch_size
from lit_fast.towers.loader import ImageLoader, load_batches
from lit_fast.towers.preprocess import Preprocess


class ImageFeatures(NamedTuple):
    """Features of the rows of a dataset whose images can be decoded."""

    rows: np.ndarray  # int64 [n], increasing
    features: np.ndarray  # bfloat16 [n, width]
    invalid: dict[int, str]  # other rows, of the images that this process has read -> reason


class DatasetEmbedder:
    """Embeds the images of datasets with an image tower, on all devices of a mesh.

    With several processes each decodes the images of its devices.

    Args:
      image: the tower.
      preprocess: of its images.
      mesh: the devices.
      workers: threads that decode; 0: one per core.
    """

    def __init__(self, image: ImageTower, preprocess: Preprocess, mesh: Mesh, workers: int = 0) -> None:
        self._image, self._preprocess, self._workers = image, preprocess, workers or cpu_count()
        self._processes = len({device.process_index for device in mesh.devices.flat})
        self._rank = jax.process_index() if self._processes > 1 else 0
        self._batch = default_batch_size() * mesh.size
        self._sharding = batch_sharding(mesh)
        # As in `compile_tower` a feature depends on the images per device, not on their number.
        features = shard_map(image.features, mesh, (REPLICATED, SHARDED), out_specs=SHARDED)

        @partial(
            jax.jit,
            in_shardings=(replicated(mesh), self._sharding, self._sharding),
            out_shardings=replicated(mesh),
        )
        def embed(params: Any, pixels: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
            return features(params, pixels).astype(jnp.bfloat16), valid

        self._embed: Callable[..., tuple[jax.Array, jax.Array]] = embed

    def __call__(self, params: Any, dataset: Dataset) -> ImageFeatures:
        """Embed all images of a dataset.

        Args:
          params: of the tower.
          dataset: its images are read from their sources.

        Raises:
          UserError: a source cannot be read.
        """
        share = self._batch // self._processes
        starts = range(0, dataset.rows, self._batch)
        first = self._rank * share
        spans = [
            (min(start + first, dataset.rows), max(0, min(share, dataset.rows - start - first)))
            for start in starts
        ]
        loader = ImageLoader(dataset, self._preprocess, MAX_PIXELS)
        features = np.zeros((len(starts) * self._batch, self._image.width), BFLOAT16)
        valid = np.zeros(len(features), bool)
        invalid: dict[int, str] = {}
        for start, batch in zip(starts, load_batches(loader, spans, share, self._workers), strict=True):
            invalid |= batch.invalid
            usable = np.zeros(share, bool)
            usable[: batch.rows] = True
            usable[[row - batch.first for row in batch.invalid]] = False
            arrays = (
                jax.make_array_from_process_local_data(self._sharding, a) for a in (batch.images, usable)
            )
            found = self._embed(params, *arrays)
            part = slice(start, start + self._batch)
            features[part], valid[part] = (np.asarray(a) for a in found)
        rows = np.flatnonzero(valid)
        return ImageFeatures(rows, features[rows], invalid)
