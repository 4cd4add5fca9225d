"""Evaluate during training.

The image embeddings of a frozen tower are loaded before the first step. With a trained image tower the images of the
evaluation sets are embedded again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lit_fast.config import Config
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import rows_without_features
from lit_fast.data.images.sources import check_sources
from lit_fast.evaluation.evaluate import Evaluate, distinct_names, retrieval_evaluation, zero_shot_evaluation
from lit_fast.evaluation.few_shot import check_few_shot, evaluate_few_shot_features
from lit_fast.evaluation.table import format_results, without_languages
from lit_fast.models.two_towers import Params, apply_image_head, centered, image_tower_params
from lit_fast.runs.run import image_embeddings
from lit_fast.towers.dataset_features import ImageFeatures
from lit_fast.utils.output import status

EmbedText = Callable[[Params, Sequence[str]], np.ndarray]

AVERAGED = " (average)"


EmbedImages = Callable[[Params, Dataset], ImageFeatures]
"""Embeds a dataset's images by the image tower of parameters, see `lit_fast.towers.dataset_features`."""


class Evaluator:
    """The evaluation sets of a configuration.

    Args:
      tower: provenance of the run's frozen vision tower; None if it is trained.

    Raises:
      UserError: a set cannot be evaluated.
    """

    def __init__(self, config: Config, tower: dict[str, Any] | None) -> None:
        self._tower, self._steps, evaluate = tower, config.steps, config.evaluate
        self._intervals = (  # in steps; those given in examples or as a share may be fractional
            evaluate.every_steps,
            evaluate.every_examples / config.stream.global_batch,
            evaluate.every_share * config.steps,
        )
        self._sets: list[tuple[Dataset, Evaluate]] = []
        for paths, evaluation in (
            (evaluate.zero_shot, zero_shot_evaluation),
            (evaluate.retrieval, retrieval_evaluation),
        ):
            for path in paths:
                dataset = open_dataset(path)
                if tower is None:
                    check_sources(dataset)
                    self._sets.append((dataset, evaluation(dataset)))
                else:
                    invalid = partial(rows_without_features, dataset, tower)
                    self._sets.append((dataset, evaluation(dataset, invalid)))
        self._few_shot = [tuple(map(open_dataset, pair.split("=", 1))) for pair in evaluate.few_shot]
        for train, test in self._few_shot:
            check_few_shot(train, test)
            for dataset in (train, test):
                check_sources(dataset)
        self._names = distinct_names(
            dataset.path for dataset in [*(d for d, _ in self._sets), *(test for _, test in self._few_shot)]
        )
        self._loaded: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._embed_images: EmbedImages | None = None
        self._reported: set[str] = set()
        self.results: list[dict[str, Any]] = []

    def load_images(self, mean: np.ndarray) -> None:
        """Load the image embeddings; `mean`, float32 [width], is subtracted first."""
        assert self._tower is not None
        for dataset, _ in self._sets:
            self._loaded[dataset.path] = image_embeddings(dataset, self._tower, mean)

    def embed_images_with(self, embed_images: EmbedImages) -> None:
        """Embed the images at each evaluation, and say how many there are."""
        self._embed_images = embed_images
        datasets = self._datasets()
        if datasets:
            images = sum(dataset.rows for dataset in datasets.values())
            status(
                f"each evaluation decodes and embeds {images:,} images of {len(datasets)} datasets "
                "with the current image tower"
            )

    def should_run(self, step: int) -> bool:
        """Return whether to evaluate after `step`."""
        passed = any(step // every > (step - 1) // every for every in self._intervals if every)
        return bool(self._sets or self._few_shot) and (passed or step == self._steps)

    def run(self, embed_text: EmbedText, params: Params, average: Params) -> list[dict[str, Any]]:
        """Evaluate all sets with `params`, and again with `average` unless it is empty.

        Returns:
          A result per set and language, also kept as `results`. Those of the average come last, marked in the name
          of the dataset.
        """
        self.results = self._run(embed_text, params)
        if average:
            averaged = self._run(embed_text, average)
            self.results += [r | {"dataset": f"{r['dataset']}{AVERAGED}"} for r in averaged]
        return self.results

    def _run(self, embed_text: EmbedText, params: Params) -> list[dict[str, Any]]:
        embedded = {}
        if self._embed_images is not None:
            for path, dataset in self._datasets().items():
                embedded[path] = self._embed_images(image_tower_params(params), dataset)
                if embedded[path].invalid and path not in self._reported:
                    self._reported.add(path)
                    row, reason = next(iter(embedded[path].invalid.items()))
                    status(
                        f"{len(embedded[path].invalid):,} images of {path} cannot be decoded and are left out of its "
                        f"evaluation (first: row {row}, {reason})"
                    )
        results = []
        for dataset, evaluate in self._sets:
            if self._embed_images is None:
                rows, images = self._loaded[dataset.path]
            else:
                rows, features, _ = embedded[dataset.path]
                images = centered(features, np.asarray(params["mean"]))
            results.append(evaluate(rows, apply_image_head(params, images), partial(embed_text, params)))
        for train, test in self._few_shot:
            pair = ((embedded[d.path].rows, embedded[d.path].features) for d in (train, test))
            results.append([evaluate_few_shot_features(train, test, *pair)])
        return [
            result | {"dataset": name}
            for name, found in zip(self._names, results, strict=True)
            for result in found
        ]

    def _datasets(self) -> dict[str, Dataset]:
        """Return all datasets by path."""
        pairs = [dataset for pair in self._few_shot for dataset in pair]
        return {dataset.path: dataset for dataset in [*(d for d, _ in self._sets), *pairs]}

    def metrics(self) -> dict[str, float]:
        """Return the last results by `<dataset>/<metric>`, without single languages."""
        return {
            f"{result['dataset']}/{metric}": value
            for result in without_languages(self.results)
            for metric, value in result["metrics"].items()
        }

    def table(self) -> str:
        """Format the last results for the terminal."""
        return format_results(without_languages(self.results))
