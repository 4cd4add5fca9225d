"""Evaluation inside the training loop: image embeddings are ready before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np

from lit_fast.config import Config
from lit_fast.dataset import BLOCK, Dataset, open_dataset
from lit_fast.errors import UserError
from lit_fast.evaluate import (
    check_retrieval,
    check_zero_shot,
    evaluate_retrieval,
    evaluate_zero_shot,
    format_table,
)
from lit_fast.run import Params, apply_image_head, image_embeddings, matching_features

EmbedText = Callable[[Params, Sequence[str]], np.ndarray]

_AVERAGED = " (average)"


class Evaluation:
    """The sets of a configuration; opening it finds whatever is wrong with them."""

    def __init__(self, run: Config, tower: dict[str, Any]) -> None:
        self._tower, self._intervals, self._steps = tower, _intervals(run), run.steps
        config = run.evaluate
        self._sets: list[tuple[Dataset, Any]] = []
        for paths, check, evaluate in (
            (config.zero_shot, check_zero_shot, evaluate_zero_shot),
            (config.retrieval, check_retrieval, evaluate_retrieval),
        ):
            for path in paths:
                dataset = open_dataset(path)
                check(dataset)
                _check_rows(
                    dataset, matching_features(dataset, tower).invalid_rows(), check is check_zero_shot
                )
                self._sets.append((dataset, evaluate))
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
            self.results += [r | {"dataset": f"{r['dataset']}{_AVERAGED}"} for r in averaged]
        return self.results

    def _run(self, embed_text: EmbedText, params: Params) -> list[dict[str, Any]]:
        return [
            evaluate(dataset, rows, apply_image_head(params, images), partial(embed_text, params))
            for dataset, evaluate, rows, images in self._ready
        ]

    def figures(self) -> dict[str, float]:
        """The last evaluation's figures by name, `<dataset>/<metric>`."""
        names = self._names()
        names += [f"{name}{_AVERAGED}" for name in names]
        return {
            f"{name}/{metric}": value
            for name, result in zip(names, self.results, strict=False)
            for metric, value in result["metrics"].items()
        }

    def _names(self) -> list[str]:
        """The sets' directory names; with the parent's where two sets have the same."""
        paths = [dataset.path.resolve() for dataset, _ in self._sets]
        count = Counter(path.name for path in set(paths))
        return [p.name if count[p.name] == 1 else f"{p.parent.name}/{p.name}" for p in paths]

    def table(self) -> str:
        """The last evaluation, for the terminal."""
        return format_table(self.results)


def _intervals(config: Config) -> list[float]:
    """The intervals of the evaluation in steps; those given as examples or shares need not be whole."""
    given = config.evaluate
    intervals = (
        given.every_steps,
        given.every_examples / config.stream.global_batch,
        given.every_share * config.steps,
    )
    return [interval for interval in intervals if interval]


def _check_rows(dataset: Dataset, invalid: Collection[int], labelled: bool) -> None:
    """What evaluation would find wrong hours later: labels without a class name, no row to evaluate."""
    usable = 0
    for b, block in enumerate(dataset.iter_blocks()):
        if labelled and max(block.labels) >= len(dataset.classnames):
            raise UserError(
                f"dataset {dataset.path} has label {max(block.labels)} but only {len(dataset.classnames)} class "
                "names (numbered from 0)"
            )
        wanted = [n >= 0 for n in block.labels] if labelled else [n > 0 for n in block.captions]
        usable += sum(w and b * BLOCK + i not in invalid for i, w in enumerate(wanted))
    if not usable:
        what = "label" if labelled else "caption"
        raise UserError(f"dataset {dataset.path} has no image with both a {what} and a valid feature")
