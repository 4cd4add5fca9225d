"""Embeddings of datasets by a run: from stored features or, where it trained its image tower, from the images."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.data.features import first_view, matching_features, open_features, stored_towers
from lit_fast.evaluation.few_shot import evaluate_few_shot, evaluate_few_shot_features
from lit_fast.models.two_towers import apply_image_head, centered, image_tower_params
from lit_fast.runs.run import Run, read_image_tower
from lit_fast.runtime import make_mesh
from lit_fast.towers.dataset_features import DatasetEmbedder
from lit_fast.towers.tower import trained_tower
from lit_fast.utils.output import status

RowFeatures = tuple[np.ndarray, np.ndarray]
"""Rows int64 [n], increasing, and their features bfloat16 [n, width]."""


class RunImages:
    """Embeds the images of datasets with the vision tower of a run."""

    def __init__(self, run: Run) -> None:
        self._run, self.tower_json = run, run.tower_json
        self._embedder: DatasetEmbedder | None = None
        self._found: dict[str, RowFeatures] = {}
        if run.config.image.trained:
            tower = trained_tower(run)
            self.tower_json = tower.provenance(run.config.image.dtype)
            image = read_image_tower(run.path, run.config, run.tower_json)
            self._embedder = DatasetEmbedder(image, tower.preprocess, make_mesh(jax.local_devices()))

    def features(self, dataset: Dataset) -> RowFeatures:
        """Return the features of a dataset's valid rows.

        Features of exactly this tower are read where the dataset has them; a trained tower embeds the images otherwise.

        Raises:
          UserError: a frozen tower has no features, or an image source cannot be read.
        """
        stores = (open_features(dataset, name) for name in stored_towers(dataset))
        if self._embedder is None or any(
            first_view(store.provenance) == first_view(self.tower_json) for store in stores
        ):
            features = matching_features(dataset, self.tower_json)
            rows = np.delete(np.arange(dataset.rows), list(features.invalid_rows()))
            return rows, features.read_all()[rows]
        if dataset.path not in self._found:
            status(
                f"embedding {dataset.rows:,} images of {dataset.path} with the image tower of {self._run.name}"
            )
            found = self._embedder(image_tower_params(self._run.params), dataset)
            if found.invalid:
                status(f"{len(found.invalid):,} images of {dataset.path} cannot be decoded and are left out")
            self._found[dataset.path] = found.rows, found.features
        return self._found[dataset.path]

    def embeddings(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Return valid rows int64 [n] and their normalized embeddings float32 [n, width]."""
        rows, features = self.features(dataset)
        params = self._run.params
        return rows, apply_image_head(params, centered(features, np.asarray(params["mean"])))

    def few_shot(self, train: Dataset, test: Dataset) -> dict[str, Any]:
        """Return the few-shot accuracy, see `lit_fast.evaluation.few_shot`."""
        if self._embedder is None:
            return evaluate_few_shot(train, test, self.tower_json)
        return evaluate_few_shot_features(train, test, self.features(train), self.features(test))
