"""Evaluation of one embedded dataset, with chance levels and confidence intervals.

A result is the JSON of CLIP_benchmark, `{"dataset", "model", "pretrained", "task", "metrics", "language"}`,
and beside it what one needs to trust its figures: how much was counted, the expected figures of a random
order (`chance`) and 95 % intervals (`interval_95`).

Whatever can be wrong with a dataset is found when its evaluation is made; the evaluation itself is a function
of embeddings, so that training runs the same code as the command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lit_fast.data.dataset import BLOCK, Dataset
from lit_fast.errors import UserError
from lit_fast.evaluation.bootstrap import bootstrap, measured
from lit_fast.evaluation.ranks import ranks
from lit_fast.evaluation.retrieval import COLUMNS, chance_recalls, recall_table, recalls, retrieval_ranks
from lit_fast.evaluation.zeroshot import EmbedText, accuracies, accuracy_table, chance_accuracies, classifier
from lit_fast.evaluation.zeroshot_set import ZeroShotSet, zero_shot_set

AVERAGE = "average"  # in place of a language
NAMED = ("template_set", "class_names", "labels", "candidates")  # of a zero-shot result, see `ZeroShotSet`

Evaluate = Callable[[np.ndarray, np.ndarray, EmbedText], list[dict[str, Any]]]
"""Of (rows int64 [n], rising, that have an embedding, their normalised embeddings float32 [n, D], texts to
normalised float32 [n, D]) to results."""

InvalidRows = Callable[[], Collection[int]]


def zero_shot_evaluation(dataset: Dataset, invalid: InvalidRows = tuple, **files: Any) -> Evaluate:
    """Zero-shot classification of the rows that have a label.

    Without templates a dataset is evaluated with the bare class names.

    Args:
      dataset: with labels and class names.
      invalid: says which rows have no embedding; asked when the rest is known to be right.
      files: class names and so on in place of the dataset's, see `zero_shot_set`.

    Raises:
      UserError: see `zero_shot_set`, or no row has both label and embedding. The evaluation raises it for
        embeddings that are not finite.
    """
    asked = zero_shot_set(dataset, **files)
    _check_rows(dataset, set(asked.row_of.tolist()), invalid, "a label")
    return partial(_zero_shot, dataset, asked)


def retrieval_evaluation(dataset: Dataset, invalid: InvalidRows = tuple) -> Evaluate:
    """Retrieval in both directions among the rows that have captions, with all their captions.

    If the dataset knows several languages of its captions there is a result for each, whose candidates are
    the captions in that language and the images that have one, and last the average over them, each language
    counting the same. That is how Crossmodal-3600 is reported; CLIP_benchmark takes of each image the first
    caption only.

    Arguments and errors as for `zero_shot_evaluation`, with captions for labels.
    """
    if not dataset.captions:
        raise UserError(f"dataset {dataset.path} has no captions for retrieval; choose a captioned one")
    counts = (n for block in dataset.iter_blocks() for n in block.captions)
    _check_rows(dataset, {row for row, n in enumerate(counts) if n}, invalid, "a caption")
    return partial(_retrieval, dataset)


def _zero_shot(
    dataset: Dataset, asked: ZeroShotSet, rows: np.ndarray, images: np.ndarray, embed_text: EmbedText
) -> list[dict[str, Any]]:
    pairs = np.isin(asked.row_of, rows)
    counted, image_of = np.unique(asked.row_of[pairs], return_inverse=True)
    class_of, count = asked.class_of[pairs], len(asked.classnames)
    if len(counted) < len(rows):  # else they are the same, and a copy would be as large as all embeddings
        images = images[np.searchsorted(rows, counted)]
    classes = classifier(asked.classnames, asked.templates, embed_text)
    _check_finite(dataset, images, classes)
    best = ranks(images, classes, image_of, class_of)
    labels = np.full(len(images), -1) if asked.several else class_of
    right = np.bincount(image_of) if asked.several else None
    told = {
        "images": len(images),
        "classes": count,
        "templates": len(asked.templates),
        "template_set": asked.template_set,
        **asked.given,
    }
    measure, table = partial(accuracies, count), accuracy_table(best, labels)
    figures, intervals = measured(measure, table), bootstrap(measure, table)
    chance = chance_accuracies(count, right)
    return [_result(dataset, "zeroshot_classification", "en", told, figures, intervals, chance)]


def _retrieval(
    dataset: Dataset, rows: np.ndarray, images: np.ndarray, embed_text: EmbedText
) -> list[dict[str, Any]]:
    captions = captions_by_language(dataset, rows)
    told: list[dict[str, Any]] = []
    tables, chances = [], []
    for own in captions.values():
        with_text, owner = np.unique([image for image, _ in own], return_inverse=True)
        texts = embed_text([text for _, text in own])
        _check_finite(dataset, images[with_text], texts)
        table = np.zeros((len(images), COLUMNS), np.int64)
        table[with_text] = recall_table(*retrieval_ranks(images[with_text], texts, owner), owner)
        tables.append(table)
        chances.append(chance_recalls(np.bincount(owner)))
        told.append({"images": len(with_text), "texts": len(texts)})
    names, table = list(captions), np.concatenate(tables, axis=1)
    table = table[table.any(axis=1)]
    if len(names) > 1:
        texts_together = sum(len(own) for own in captions.values())
        told.append({"images": len(table), "texts": texts_together, "languages": list(captions)})
        chances.append({name: float(np.mean([c[name] for c in chances])) for name in chances[0]})
        names.append(AVERAGE)
    measure = partial(_recalls, names)
    figures, intervals = measured(measure, table), bootstrap(measure, table)
    return [
        _result(
            dataset,
            "zeroshot_retrieval",
            language,
            counted,
            {metric: figures[f"{language}/{metric}"] for metric in chance},
            {metric: intervals[f"{language}/{metric}"] for metric in chance},
            chance,
        )
        for language, counted, chance in zip(names, told, chances, strict=True)
    ]


def captions_by_language(dataset: Dataset, rows: np.ndarray) -> dict[str, list[tuple[int, str]]]:
    """By language, every caption with the number of its image among the embedded ones.

    Where no language is known all captions are "en", as CLIP_benchmark has it; where some are, the others
    are "und", ISO 639's word for undetermined.
    """
    number = {row: i for i, row in enumerate(rows.tolist())}
    unknown = "und" if dataset.languages else "en"
    found: dict[str, list[tuple[int, str]]] = {}
    for b, (block, lists) in enumerate(zip(dataset.iter_blocks(), dataset.iter_captions(), strict=True)):
        for i, texts in enumerate(lists):
            image = number.get(b * BLOCK + i)
            if image is None:
                continue
            languages = (block.languages[i] if block.languages else ()) or [""] * len(texts)
            for text, language in zip(texts, languages, strict=True):
                found.setdefault(language or unknown, []).append((image, text))
    return dict(sorted(found.items()))


def _recalls(languages: Sequence[str], rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Recalls by `language/metric`; the last of several languages is the average over the others."""
    sums = (weights @ rows.astype(np.float64)).reshape(len(weights), -1, COLUMNS)
    each = [recalls(sums[:, i]) for i in range(sums.shape[1])]
    if len(languages) > 1:
        with np.errstate(invalid="ignore"):
            each.append({name: np.nanmean([one[name] for one in each], axis=0) for name in each[0]})
    return {
        f"{l}/{name}": value for l, one in zip(languages, each, strict=True) for name, value in one.items()
    }


def _check_rows(dataset: Dataset, wanted: set[int], invalid: InvalidRows, what: str) -> None:
    if not wanted.difference(invalid()):
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
    language: str,
    counted: dict[str, Any],
    figures: dict[str, float],
    intervals: dict[str, list[float]],
    chance: dict[str, float],
) -> dict[str, Any]:
    return {
        "dataset": dataset.name,
        "model": "",
        "pretrained": "",
        "task": task,
        "metrics": figures,
        "language": language,
        "rows": dataset.rows,
        **counted,
        "chance": chance,
        "interval_95": intervals,
    }


def distinct_names(paths: Iterable[Path | str]) -> list[str]:
    """The directories' names; with the parent's where two of them have the same."""
    resolved = [Path(path).resolve() for path in paths]
    count = Counter(path.name for path in set(resolved))
    return [p.name if count[p.name] == 1 else f"{p.parent.name}/{p.name}" for p in resolved]
