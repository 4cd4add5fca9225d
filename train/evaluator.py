"""Evaluation inside the training loop: image embeddings are ready before the first step."""

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


class Evaluation:
    """The sets of a configuration; opening it finds whatever is wrong with them."""

    def __init__(self, run: Config, tower: dict[str, Any]) -> None:
        self._tower, self._intervals, self._steps = tower, _intervals(run), run.steps
        config = run.evaluate
        self._sets: list[tuple[Dataset, Evaluate]] = []
        for paths, evaluation in (
            (config.zero_shot, zero_shot_evaluation),
            (config.retrieval, retrieval_evaluation),
        ):
            for path in paths:
                dataset = open_dataset(path)
                invalid = partial(rows_without_features, dataset, tower)
                self._sets.append((dataset, evaluation(dataset, invalid)))
        self._names = distinct_names(dataset.path for dataset, _ in self._sets)
        self.results: list[dict[str, Any]] = []

    def prepare(self, mean: np.ndarray) -> None:
        """Load the image embeddings; `mean` float32 [width] is subtracted before normalising."""
        self._ready = [(d, evaluate, *image_embeddings(d, self._tower, mean)) for d, evaluate in self._sets]

    def due(self, number: int) -> bool:
        """Whether there is something to evaluate after step `number`."""
        passed = any(number // every > (number - 1) // every for every in self._intervals)
        return bool(self._sets) and (passed or number == self._steps)

    def run(self, embed_text: EmbedText, params: Params, average: Params) -> list[dict[str, Any]]:
        """Evaluate all sets, also with the average of the weights if it is not empty.

        The results are kept as `results`; those of the average come last, marked in the set's name.
        """
        self.results = self._run(embed_text, params)
        if average:
            averaged = self._run(embed_text, average)
            self.results += [r | {"dataset": f"{r['dataset']}{AVERAGED}"} for r in averaged]
        return self.results

    def _run(self, embed_text: EmbedText, params: Params) -> list[dict[str, Any]]:
        return [
            result | {"dataset": name}
            for name, (_, evaluate, rows, images) in zip(self._names, self._ready, strict=True)
            for result in evaluate(rows, apply_image_head(params, images), partial(embed_text, params))
        ]

    def figures(self) -> dict[str, float]:
        """The last evaluation's figures by name, `<dataset>/<metric>`; single languages of several are left out."""
        return {
            f"{result['dataset']}/{metric}": value
            for result in without_languages(self.results)
            for metric, value in result["metrics"].items()
        }

    def table(self) -> str:
        """The last evaluation, for the terminal."""
        return format_results(without_languages(self.results))


def _intervals(config: Config) -> list[float]:
    """The intervals of the evaluation in steps; those given as examples or shares need not be whole."""
    given = config.evaluate
    intervals = (
        given.every_steps,
        given.every_examples / config.stream.global_batch,
        given.every_share * config.steps,
    )
    return [interval for interval in intervals if interval]
