"""Evaluation of one embedded dataset, with chance levels and confidence intervals.

A result is the JSON of CLIP_benchmark, `{"dataset", "model", "pretrained", "task", "metrics", "language"}`,
and beside it what one needs to trust its figures: how much was counted, the expected figures of a random
order (`chance`) and 95 % intervals (`interval_95`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from lit_fast.dataset import Dataset
from lit_fast.errors import UserError
from lit_fast.retrieval import chance_recalls, recalls, retrieval_ranks
from lit_fast.zeroshot import (
    EmbedText,
    accuracies,
    canonical_names,
    canonical_templates,
    chance_accuracies,
    classifier,
    label_ranks,
)

RESAMPLES = 1000

_TASKS = {"zeroshot_classification": "zero-shot", "zeroshot_retrieval": "retrieval"}


def check_zero_shot(dataset: Dataset) -> None:
    """Raises UserError if the dataset cannot be evaluated by zero-shot classification; reads no row."""
    remedy = "index tars with a class number per image (key.cls) and a classnames.txt beside them"
    missing = [
        n for n, have in (("labels", dataset.labelled), ("class names", dataset.classnames)) if not have
    ]
    if missing:
        raise UserError(
            f"dataset {dataset.path} has no {' and no '.join(missing)} for zero-shot classification; {remedy}"
        )
    try:
        canonical_names(dataset.classnames)
        canonical_templates(dataset.templates)
    except UserError as error:
        raise UserError(f"dataset {dataset.path}: {error} and index it anew") from None


def check_retrieval(dataset: Dataset) -> None:
    """Raises UserError if the dataset cannot be evaluated by retrieval; reads no row."""
    if not dataset.captions:
        raise UserError(f"dataset {dataset.path} has no captions for retrieval; choose a captioned one")


def evaluate_zero_shot(
    dataset: Dataset, rows: np.ndarray, images: np.ndarray, embed_text: EmbedText
) -> dict[str, Any]:
    """Zero-shot classification of the rows that have a label.

    Without templates of its own a dataset is evaluated with the bare class names.

    Args:
      dataset: with labels and class names.
      rows: int64 [n], the rows that have an embedding, rising.
      images: their normalised embeddings, float32 [n, D].
      embed_text: texts to normalised float32 [n, D].

    Raises:
      UserError: no labels or class names, no row with both label and embedding, or an embedding that is
        not finite.
    """
    check_zero_shot(dataset)
    all_labels = np.concatenate([np.array(block.labels, np.int64) for block in dataset.iter_blocks()])
    labelled = all_labels[rows] >= 0
    rows, images, labels = rows[labelled], images[labelled], all_labels[rows[labelled]]
    _check_rows(dataset, len(rows), "a label")
    count = len(dataset.classnames)
    if labels.max() >= count:
        raise UserError(
            f"dataset {dataset.path} has label {labels.max()} but only {count} class names (numbered from 0)"
        )
    templates = dataset.templates or ("{c}",)
    classes = classifier(dataset.classnames, templates, embed_text)
    _check_finite(dataset, images, classes)
    measure = partial(accuracies, label_ranks(images, classes, labels), labels, count)
    counted = {"images": len(rows), "classes": count, "templates": len(templates)}
    return _result(dataset, "zeroshot_classification", measure, chance_accuracies(count), counted)


def evaluate_retrieval(
    dataset: Dataset, rows: np.ndarray, images: np.ndarray, embed_text: EmbedText
) -> dict[str, Any]:
    """Retrieval in both directions among the rows that have captions, with all their captions.

    Arguments and errors as for `evaluate_zero_shot`, with captions for labels.
    """
    check_retrieval(dataset)
    captions = [c for block in dataset.iter_captions() for c in block]
    counts = np.array([len(captions[row]) for row in rows], np.int64)
    rows, images, counts = rows[counts > 0], images[counts > 0], counts[counts > 0]
    _check_rows(dataset, len(rows), "a caption")
    texts = embed_text([text for row in rows for text in captions[row]])
    _check_finite(dataset, images, texts)
    owner = np.repeat(np.arange(len(rows)), counts)
    measure = partial(recalls, *retrieval_ranks(images, texts, owner), owner)
    counted = {"images": len(rows), "texts": len(texts)}
    return _result(dataset, "zeroshot_retrieval", measure, chance_recalls(counts), counted)


def _check_rows(dataset: Dataset, count: int, what: str) -> None:
    if not count:
        raise UserError(f"dataset {dataset.path} has no image with both {what} and a valid feature")


def _check_finite(dataset: Dataset, images: np.ndarray, texts: np.ndarray) -> None:
    # A NaN is neither above nor below anything: its rank would be the best of all.
    for name, array in (("image", images), ("text", texts)):
        if not np.isfinite(array).all():
            raise UserError(
                f"evaluation of {dataset.path}: {name} embeddings are not finite; the "
                + ("features are damaged, embed them anew" if name == "image" else "weights are not usable")
            )


def _result(
    dataset: Dataset,
    task: str,
    measure: Callable[[np.ndarray], dict[str, float]],
    chance: dict[str, float],
    counted: dict[str, int],
) -> dict[str, Any]:
    return {
        "dataset": dataset.name,
        "model": "",
        "pretrained": "",
        "task": task,
        "metrics": measure(np.ones(counted["images"])),
        "language": "en",
        "rows": dataset.rows,
        **counted,
        "chance": chance,
        "interval_95": bootstrap(measure, counted["images"]),
    }


def bootstrap(
    measure: Callable[[np.ndarray], dict[str, float]], images: int, resamples: int = RESAMPLES
) -> dict[str, list[float]]:
    """95 % percentile intervals of figures over the choice of images.

    An image is drawn together with its captions; the candidates of a retrieval stay the same. How far
    another training of the same recipe would land is not in the interval.

    Args:
      measure: weights float [images], how often each image counts, to figures by name.
      images: how many there are.
      resamples: sets of `images` images drawn with replacement, from a fixed seed.
    """
    generator = np.random.default_rng(0)
    drawn: list[dict[str, float]] = []
    for _ in range(resamples):
        picks = generator.integers(0, images, images, np.uint32)
        drawn.append(measure(np.bincount(picks, minlength=images).astype(np.float64)))
    return {
        name: np.quantile([figures[name] for figures in drawn], (0.025, 0.975)).tolist() for name in drawn[0]
    }


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Results as a table in percent, a line on what was counted under it."""
    header = ("dataset", "task", "metric", "%", "95 % interval", "chance")
    table = [header, *(line for result in results for line in _lines(result))]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    return "\n".join([*text, "", *map(_counted, results)])


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, value in result["metrics"].items():
        low, high = result["interval_95"][name]
        yield (
            result["dataset"],
            _TASKS[result["task"]],
            name,
            f"{100 * value:.1f}",
            f"{100 * low:5.1f} - {100 * high:5.1f}",
            f"{100 * result['chance'][name]:.1f}",
        )


def _counted(result: dict[str, Any]) -> str:
    names = [name for name in ("images", "texts", "classes", "templates") if name in result]
    number = ", ".join(f"{name} {result[name]:,}" for name in names)
    left = result["rows"] - result["images"]
    without = "label" if "classes" in result else "caption"
    skipped = f"; {left:,} rows without {without} or valid image were skipped" if left else ""
    return f"{result['dataset']} {_TASKS[result['task']]}: {number}{skipped}"
