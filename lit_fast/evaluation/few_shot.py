"""Few-shot linear evaluation: a ridge regression on the features of a few images per class.

The procedure is big_vision's (evaluators/fewshot_lsr.py), on features as they are stored: not normalised, but rounded
to bfloat16. The figures are a property of the tower, the same for every run on it, so they are computed once and kept
beside the features of the test images:

    E/features/<tower>/few_shot/<digest of what decides the figures>.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.data.features import Features, matching_features, read_error
from lit_fast.errors import UserError
from lit_fast.evaluation.bootstrap import bootstrap
from lit_fast.storage.files import read_json, write_json

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
RIDGE = 1024.0
_CONSTANT = 100.0  # value of the feature that stands for the bias: so large that the ridge hardly holds it
_PROCEDURE = 1  # counts the changes of what is below that change figures
_TILE = 4096  # test images scored at a time


def check_few_shot(train: Dataset, test: Dataset) -> None:
    """Raises UserError if the datasets cannot be evaluated together; reads no row."""
    for dataset in (train, test):
        if not dataset.labelled:
            raise UserError(
                f"dataset {dataset.path} has no labels for few-shot classification; index tars with a class "
                "number per image (key.cls)"
            )
        if len(dataset.classnames) == 1:
            raise UserError(
                f"dataset {dataset.path} has one class; few-shot classification needs two or more"
            )
    if train.classnames != test.classnames:
        raise UserError(
            f"datasets {train.path} and {test.path} have different classes ({_difference(train, test)}); "
            "few-shot classification needs the same classnames.txt in both"
        )
    if train.digest == test.digest:
        raise UserError(
            f"datasets {train.path} and {test.path} have the same rows; few-shot classification needs test images "
            "that it has not learnt from"
        )


def _difference(train: Dataset, test: Dataset) -> str:
    a, b = train.classnames, test.classnames
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} names"
    number = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
    return f"number {number} is {a[number]!r} and {b[number]!r}"


def evaluate_few_shot(train: Dataset, test: Dataset, tower: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on the test images of a classifier learnt from 1, 5, 10 and 25 training images per class.

    A figure is the mean over three draws of the training images (`seeds` has each). Its interval is over the choice of
    the test images and of the draws: with one image per class the draws differ more than the test images can tell.
    What was computed before is read from the cache, of which a damaged file counts for nothing.

    Args:
      train, test: labelled datasets with the same classes and features of the tower.
      tower: `tower.json` of the run.

    Returns:
      A result as of `lit_fast.evaluation.evaluate`, with `seeds`: metric -> a figure per seed.

    Raises:
      UserError: see `check_few_shot`; also images of less than two classes, labels beyond the class names or
        features that are not finite.
    """
    check_few_shot(train, test)
    sets = [_labelled(dataset, matching_features(dataset, tower)) for dataset in (train, test)]
    cache = (
        Path(sets[1].features.path)
        / "few_shot"
        / f"{_digest([_PROCEDURE, *(s.identity for s in sets)])}.json"
    )
    found = _cached(cache)
    if found is None:
        found = _measure(*sets)
        with suppress(OSError):  # a dataset that cannot be written to is evaluated each time
            write_json(cache, {"digest": _digest(found), "result": found})
    about = {"dataset": test.name, "model": "", "pretrained": "", "task": "few_shot_classification"}
    return about | {"language": "", "rows": test.rows, "train_dataset": train.name} | found


@dataclass(frozen=True)
class _Labelled:
    """The rows of a dataset with both label and feature."""

    features: Features
    rows: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n]

    @property
    def identity(self) -> list[Any]:
        """What decides the rows, their labels and their features."""
        digests = [manifest.features for manifest in self.features.manifests().values()]
        arrays = [hashlib.blake2b(a.tobytes(), digest_size=16).hexdigest() for a in (self.rows, self.labels)]
        return [self.features.dataset.digest, self.features.identity, *digests, *arrays]

    def read(self, chosen: np.ndarray) -> np.ndarray:
        """float32 [k, width] of some of the rows, given as positions in `rows`, rising."""
        dataset, width = self.features.dataset, self.features.width
        try:
            read = self.features.array()[self.rows[chosen], :width].read().result().astype(np.float32)
        except ValueError as error:
            raise read_error(self.features.path, error) from None
        if not np.isfinite(read).all():
            raise UserError(f"features of {dataset.path} are not finite; they are damaged, embed them anew")
        return read


def _labelled(dataset: Dataset, features: Features) -> _Labelled:
    labels = np.concatenate([np.array(block.labels, np.int64) for block in dataset.iter_blocks()])
    usable = labels >= 0
    usable[list(features.invalid_rows())] = False
    rows = np.nonzero(usable)[0]
    if not len(rows):
        raise UserError(f"dataset {dataset.path} has no image with both a label and a valid feature")
    names = len(dataset.classnames)
    if names and labels.max() >= names:
        raise UserError(
            f"dataset {dataset.path} has label {labels.max()} but only {names} class names (numbered from 0)"
        )
    return _Labelled(features, rows, labels[rows])


def _measure(train: _Labelled, test: _Labelled) -> dict[str, Any]:
    dataset = train.features.dataset
    if len(np.unique(train.labels)) < 2:
        raise UserError(
            f"dataset {dataset.path} has images of one class; few-shot classification needs two or more"
        )
    classes = len(dataset.classnames) or 1 + int(max(train.labels.max(), test.labels.max()))
    draws = [draw(train.labels, classes, seed) for seed in SEEDS]
    used = np.unique(np.concatenate([few for order in draws for few in first(order, max(SHOTS))]))
    features = train.read(used)
    tested = test.read(np.arange(len(test.rows)))
    names = [f"acc1_{shots}shot" for shots in SHOTS]
    right = np.zeros((len(test.rows), len(SHOTS), len(SEEDS)), bool)
    for column, shots in enumerate(SHOTS):
        for seed, order in enumerate(draws):
            chosen = np.concatenate(first(order, shots))
            few = features[np.searchsorted(used, chosen)]
            called = classify(few, train.labels[chosen], tested, classes)
            right[:, column, seed] = called == test.labels
    return {
        "metrics": dict(zip(names, right.mean(axis=(0, 2)).tolist(), strict=True)),
        "images": len(test.rows),
        "classes": classes,
        "train_images": len(train.rows),
        "seeds": dict(zip(names, right.mean(axis=0).tolist(), strict=True)),
        "chance": dict.fromkeys(names, 1 / classes),
        "interval_95": intervals(right, names),
    }


def intervals(right: np.ndarray, names: Sequence[str]) -> dict[str, list[float]]:
    """95 % intervals of the means of `right` [images, figures, seeds], by the figures' names.

    Each resample draws as many images, and as many seeds, as there are, with replacement.
    """
    images, figures, seeds = right.shape
    generator = np.random.default_rng(0)

    def measure(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        shares = (weights @ rows / images).reshape(-1, figures, seeds)
        drawn = generator.integers(0, seeds, (len(shares), 1, seeds))
        return dict(zip(names, np.take_along_axis(shares, drawn, axis=2).mean(axis=2).T, strict=True))

    return bootstrap(measure, right.reshape(images, -1).astype(np.int64))


def draw(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """Per class the positions in `labels`, int [n], that have it, in random order.

    The classes take their turns from one generator, so that the order of a class depends on the sizes of those
    before it, as in big_vision.
    """
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.nonzero(labels == number)[0]) for number in range(classes)]


def first(order: Sequence[np.ndarray], shots: int) -> list[np.ndarray]:
    """The first `shots` of each class; a class that has fewer keeps what it has."""
    return [positions[:shots] for positions in order]


def classify(few: np.ndarray, labels: np.ndarray, images: np.ndarray, classes: int) -> np.ndarray:
    """The class that a ridge regression on `few` gives to images.

    Every feature is shifted by its mean over `few` and divided by its population standard deviation there plus 1e-5;
    a constant feature is appended; targets are 1 for the own class and -1 for the others. The weights minimise the sum
    of the squared errors plus 1024 times the sum of the squared weights. In float64, where big_vision has float32.

    Args:
      few: float [n, width].
      labels: int [n], below `classes`.
      images: float [m, width].
      classes: how many there are.

    Returns:
      int64 [m]; of equal scores the lower class.
    """
    few = few.astype(np.float64)
    mean, deviation = few.mean(axis=0), few.std(axis=0) + 1e-5

    def prepared(x: np.ndarray) -> np.ndarray:
        return np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=_CONSTANT)

    targets = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    weights = ridge(prepared(few), targets)
    tiles = [prepared(images[lo : lo + _TILE]) @ weights for lo in range(0, len(images), _TILE)]
    return np.concatenate([scores.argmax(axis=1) for scores in tiles])


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """argmin |x w - y|^2 + 1024 |w|^2, float64 [d, k], for x [n, d] and y [n, k].

    w = (x'x + 1024)^-1 x'y = x'(xx' + 1024)^-1 y; the smaller system is solved.
    """
    from scipy.linalg import solve

    n, d = x.shape
    if n >= d:
        return solve(x.T @ x + RIDGE * np.eye(d), x.T @ y, assume_a="pos")
    return x.T @ solve(x @ x.T + RIDGE * np.eye(n), y, assume_a="pos")


def _cached(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
        return value["result"] if value["digest"] == _digest(value["result"]) else None
    except (UserError, KeyError, TypeError):
        return None


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
