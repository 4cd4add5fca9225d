"""Evaluate during training; image embeddings are loaded before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lit_fast.config import Config
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import rows_without_features
from lit_fast.evaluation.evaluate import Evaluate, distinct_names, retrieval_evaluation, zero_shot_evaluation
from lit_fast.evaluation.table import format_results, without_languages
from lit_fast.models.two_towers import Params, apply_image_head
from lit_fast.runs.run import image_embeddings

EmbedText = Callable[[Params, Sequence[str]], np.ndarray]

AVERAGED = " (average)"


class Evaluator:
    """The evaluation sets of a configuration.

    Args:
      tower: provenance of the run's vision tower.

    Raises:
      UserError: a set cannot be evaluated.
    """

    def __init__(self, config: Config, tower: dict[str, Any]) -> None:
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
                invalid = partial(rows_without_features, dataset, tower)
                self._sets.append((dataset, evaluation(dataset, invalid)))
        self._names = distinct_names(dataset.path for dataset, _ in self._sets)
        self.results: list[dict[str, Any]] = []

    def load_images(self, mean: np.ndarray) -> None:
        """Load the image embeddings; `mean`, float32 [width], is subtracted first."""
        self._loaded = [(d, evaluate, *image_embeddings(d, self._tower, mean)) for d, evaluate in self._sets]

    def should_run(self, step: int) -> bool:
        """Return whether to evaluate after `step`."""
        passed = any(step // every > (step - 1) // every for every in self._intervals if every)
        return bool(self._sets) and (passed or step == self._steps)

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
        return [
            result | {"dataset": name}
            for name, (_, evaluate, rows, images) in zip(self._names, self._loaded, strict=True)
            for result in evaluate(rows, apply_image_head(params, images), partial(embed_text, params))
        ]

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
