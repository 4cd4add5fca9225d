"""Few-shot linear evaluation: a ridge regression on the features of a few images per class.

The procedure is big_vision's (evaluators/fewshot_lsr.py), on features as stored: not normalized, rounded to bfloat16.
The figures depend on the tower alone and are the same for all its runs, so they are computed once and cached with the
features of the test images:

    E/features/<tower>/few_shot/<digest of rows, labels, features and procedure>.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.data.features import Features, matching_features
from lit_fast.data.shards import read_error
from lit_fast.errors import UserError
from lit_fast.evaluation.bootstrap import bootstrap
from lit_fast.storage.paths import join
from lit_fast.storage.text_files import read_json, write_json

RowFeatures = tuple[np.ndarray, np.ndarray]
"""Rows int64 [n], increasing, and their features bfloat16 [n, width]."""

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
RIDGE = 1024.0
_CONSTANT = 100.0  # value of the bias feature; large, so the ridge hardly penalises the bias
_PROCEDURE = 1  # version of the code below; a change of figures increments it
_TILE = 4096  # test images scored at a time


def check_few_shot(train: Dataset, test: Dataset) -> None:
    """Check that the datasets can be evaluated together, without reading rows.

    Raises:
      UserError: labels are missing, the classes differ, or the rows are the same.
    """
    for dataset in (train, test):
        if not dataset.labelled:
            raise UserError(
                f"dataset {dataset.path} has no labels for few-shot classification; index tars with a class number per "
                "image (key.cls)"
            )
        if len(dataset.classnames) == 1:
            raise UserError(
                f"dataset {dataset.path} has one class for few-shot classification; give one with two or more"
            )
    if train.classnames != test.classnames:
        raise UserError(
            f"datasets {train.path} and {test.path} have different classes ({_difference(train, test)}); few-shot "
            "classification needs the same classnames.txt in both"
        )
    if train.digest == test.digest:
        raise UserError(
            f"datasets {train.path} and {test.path} have the same rows; few-shot classification needs other test images"
        )


def _difference(train: Dataset, test: Dataset) -> str:
    a, b = train.classnames, test.classnames
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} names"
    index = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
    return f"number {index} is {a[index]!r} and {b[index]!r}"


def evaluate_few_shot(train: Dataset, test: Dataset, tower: dict[str, Any]) -> dict[str, Any]:
    """Measure the accuracy of classifiers fitted to 1, 5, 10 and 25 training images per class.

    A figure is the mean over three draws of the training images, listed in `seeds`. Its interval is over the choice of
    test images and of draws, because with one image per class the draws differ more than the test images can show.
    Results are cached; a damaged cache file is ignored.

    Args:
      train: labelled dataset with features of the tower.
      test: labelled dataset of the same classes with features of the tower.
      tower: `tower.json` of the run.

    Returns:
      A result as in `lit_fast.evaluation.evaluate`, with `seeds`: metric -> a figure per seed.

    Raises:
      UserError: see `check_few_shot`; images of less than two classes, labels beyond the class names, or features that
        are not finite.
    """
    check_few_shot(train, test)
    stores = [matching_features(dataset, tower) for dataset in (train, test)]
    sets = [_labelled(store.dataset, store.invalid_rows(), partial(_read, store)) for store in stores]
    digest = _digest([_PROCEDURE, *map(_identity, stores, sets)])
    cache = join(stores[1].path, "few_shot", f"{digest}.json")
    figures = _cached(cache)
    if figures is None:
        figures = _evaluate(*sets)
        with suppress(OSError):  # a dataset on a read-only disk is evaluated each time
            write_json(cache, {"digest": _digest(figures), "result": figures})
    return _result(train, test, figures)


def evaluate_few_shot_features(
    train: Dataset, test: Dataset, train_images: RowFeatures, test_images: RowFeatures
) -> dict[str, Any]:
    """Do as `evaluate_few_shot` with given features, of a tower that is being trained; nothing is cached.

    Args:
      train, test: as of `evaluate_few_shot`.
      train_images, test_images: rows int64 [n], increasing, and their features bfloat16 [n, width].
    """
    sets = []
    for dataset, (rows, features) in ((train, train_images), (test, test_images)):
        invalid = np.setdiff1d(np.arange(dataset.rows), rows)

        def read(wanted: np.ndarray, rows: np.ndarray = rows, features: np.ndarray = features) -> np.ndarray:
            return features[np.searchsorted(rows, wanted)]

        sets.append(_labelled(dataset, invalid, read))
    return _result(train, test, _evaluate(*sets))


def _result(train: Dataset, test: Dataset, figures: dict[str, Any]) -> dict[str, Any]:
    head = {"dataset": test.name, "model": "", "pretrained": "", "task": "few_shot_classification"}
    return head | {"language": "", "rows": test.rows, "train_dataset": train.name} | figures


@dataclass(frozen=True)
class _Labelled:
    """The rows of a dataset that have both label and feature.

    Attributes:
      dataset: of the rows.
      rows: int64 [n], increasing.
      labels: int64 [n].
      read_rows: returns the features bfloat16 [k, width] of increasing rows of the dataset.
    """

    dataset: Dataset
    rows: np.ndarray
    labels: np.ndarray
    read_rows: Callable[[np.ndarray], np.ndarray]

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Read the features at increasing positions of `rows`: float32 [k, width]."""
        values = self.read_rows(self.rows[positions]).astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"features of {self.dataset.path} are not finite; embed the dataset again")
        return values


def _read(features: Features, rows: np.ndarray) -> np.ndarray:
    """Read the stored features of rows, bfloat16 [k, width]."""
    try:
        values: np.ndarray = features.array()[rows, : features.width].read().result()
    except ValueError as error:
        raise read_error(features.path, error) from None
    return values


def _identity(features: Features, labelled: _Labelled) -> list[Any]:
    """Return digests of the rows, their labels and their features."""
    digests = [manifest.features for manifest in features.manifests().values()]
    arrays = (labelled.rows, labelled.labels)
    hashes = [hashlib.blake2b(a.tobytes(), digest_size=16).hexdigest() for a in arrays]
    return [features.dataset.digest, features.identity, *digests, *hashes]


def _labelled(
    dataset: Dataset, invalid: Iterable[int], read_rows: Callable[[np.ndarray], np.ndarray]
) -> _Labelled:
    labels = np.concatenate([np.array(block.labels, np.int64) for block in dataset.iter_blocks()])
    usable = labels >= 0
    usable[list(invalid)] = False
    rows = np.flatnonzero(usable)
    if not len(rows):
        raise UserError(
            f"dataset {dataset.path} has no image with both a label and a valid feature; choose another"
        )
    names = len(dataset.classnames)
    if names and labels.max() >= names:
        raise UserError(
            f"dataset {dataset.path} has label {labels.max()} but only {names} class names (numbered from 0); add the "
            "missing names and index it again"
        )
    return _Labelled(dataset, rows, labels[rows], read_rows)


def _evaluate(train: _Labelled, test: _Labelled) -> dict[str, Any]:
    dataset = train.dataset
    if len(np.unique(train.labels)) < 2:
        raise UserError(
            f"dataset {dataset.path} has images of one class; few-shot classification needs two or more"
        )
    classes = len(dataset.classnames) or 1 + int(max(train.labels.max(), test.labels.max()))
    orders = [shuffle_by_class(train.labels, classes, seed) for seed in SEEDS]
    used = np.unique(np.concatenate([take_shots(order, max(SHOTS)) for order in orders]))
    train_features, test_features = train.read(used), test.read(np.arange(len(test.rows)))
    names = [f"acc1_{shots}shot" for shots in SHOTS]
    right = np.zeros((len(test.rows), len(SHOTS), len(SEEDS)), bool)
    for column, shots in enumerate(SHOTS):
        for seed, order in enumerate(orders):
            positions = take_shots(order, shots)
            few = train_features[np.searchsorted(used, positions)]
            predicted = classify(few, train.labels[positions], test_features, classes)
            right[:, column, seed] = predicted == test.labels
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
    """Return 95 % intervals of the means of `right`, bool [images, figures, seeds], by the figures' names.

    Each resample draws as many images, and as many seeds, as there are, with replacement.
    """
    images, figures, seeds = right.shape
    generator = np.random.default_rng(0)

    def statistics(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        shares = (weights @ rows / images).reshape(-1, figures, seeds)
        drawn = generator.integers(0, seeds, (len(shares), 1, seeds))
        return dict(zip(names, np.take_along_axis(shares, drawn, axis=2).mean(axis=2).T, strict=True))

    return bootstrap(statistics, right.reshape(images, -1).astype(np.int64))


def shuffle_by_class(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """Return the positions in `labels` of each class, int64 [n], in random order.

    All classes use one generator in turn, so the order of a class depends on the sizes of those before it, as in
    big_vision.
    """
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.flatnonzero(labels == label)) for label in range(classes)]


def take_shots(order: Sequence[np.ndarray], shots: int) -> np.ndarray:
    """Return the first `shots` positions of each class, int64 [n]; all of a class that has fewer."""
    return np.concatenate([positions[:shots] for positions in order])


def classify(few: np.ndarray, labels: np.ndarray, images: np.ndarray, classes: int) -> np.ndarray:
    """Predict the classes of images with a ridge regression fitted to a few labelled ones.

    Features are standardised by the mean and the population standard deviation plus 1e-5 of `few`; a constant feature
    is appended; targets are 1 for the own class and -1 for the others. The weights minimise the sum of squared errors
    plus 1024 times the sum of squared weights. In float64, where big_vision uses float32.

    Args:
      few: float [n, width].
      labels: int [n], below `classes`.
      images: float [m, width].
      classes: their number.

    Returns:
      int64 [m]; the lowest class of equal scores.
    """
    few = few.astype(np.float64)
    mean, deviation = few.mean(axis=0), few.std(axis=0) + 1e-5

    def standardise(x: np.ndarray) -> np.ndarray:
        return np.pad((x - mean) / deviation, ((0, 0), (0, 1)), constant_values=_CONSTANT)

    targets = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    weights = ridge(standardise(few), targets)
    tiles = [standardise(images[lo : lo + _TILE]) @ weights for lo in range(0, len(images), _TILE)]
    return np.concatenate([scores.argmax(axis=1) for scores in tiles])


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return argmin |x w - y|^2 + 1024 |w|^2, float64 [d, k], for x [n, d] and y [n, k].

    w = (x'x + 1024)^-1 x'y = x'(xx' + 1024)^-1 y; the smaller system is solved.
    """
    from scipy.linalg import solve

    n, d = x.shape
    if n >= d:
        return solve(x.T @ x + RIDGE * np.eye(d), x.T @ y, assume_a="pos")
    return x.T @ solve(x @ x.T + RIDGE * np.eye(n), y, assume_a="pos")


def _cached(path: str) -> dict[str, Any] | None:
    try:
        value = read_json(path)
        return value["result"] if value["digest"] == _digest(value["result"]) else None
    except (UserError, KeyError, TypeError):
        return None


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
