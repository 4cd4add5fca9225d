"""Evaluation of one embedded dataset, with chance levels and confidence intervals.

A result is the JSON of CLIP_benchmark, `{"dataset", "model", "pretrained", "task", "metrics", "language"}`, with the
numbers of images, texts and classes, the expected figures of a random order (`chance`) and 95 % intervals
(`interval_95`).

A dataset is checked when its evaluation is made. The evaluation is a function of embeddings, so training and the
command `eval` run the same code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lit_fast.data.dataset import BLOCK, Dataset
from lit_fast.errors import UserError
from lit_fast.evaluation.bootstrap import bootstrap, point_estimates
from lit_fast.evaluation.ranks import ranks
from lit_fast.evaluation.retrieval import COLUMNS, chance_recalls, recall_table, recalls, retrieval_ranks
from lit_fast.evaluation.zeroshot import EmbedText, accuracies, accuracy_table, chance_accuracies, classifier
from lit_fast.evaluation.zeroshot_set import ZeroShotSet, zero_shot_set
from lit_fast.storage.paths import StrPath, absolute, name, parent

AVERAGE = "average"  # in place of a language
SETTINGS = ("template_set", "class_names", "labels", "candidates")  # of a zero-shot result, see `ZeroShotSet`

Evaluate = Callable[[np.ndarray, np.ndarray, EmbedText], list[dict[str, Any]]]
"""(rows, images, embed_text) -> results.

`rows` int64 [n] are the rows that have an embedding, increasing; `images` float32 [n, D] are their normalized
embeddings; `embed_text` maps texts to normalized float32 [m, D].
"""

InvalidRows = Callable[[], Collection[int]]
"""Returns the rows without an embedding; called after all other checks."""


def zero_shot_evaluation(dataset: Dataset, invalid: InvalidRows = tuple, **files: Any) -> Evaluate:
    """Make the zero-shot classification of the rows that have a label.

    A dataset without templates is evaluated with the bare class names.

    Args:
      dataset: with labels and class names.
      invalid: see `InvalidRows`.
      files: class names and so on in place of the dataset's, see `zero_shot_set`.

    Raises:
      UserError: see `zero_shot_set`, or no row has both label and embedding. The evaluation raises it for embeddings
        that are not finite.
    """
    task = zero_shot_set(dataset, **files)
    _check_rows(dataset, set(task.row_of.tolist()), invalid, "a label")
    return partial(_zero_shot, dataset, task)


def retrieval_evaluation(dataset: Dataset, invalid: InvalidRows = tuple) -> Evaluate:
    """Make the retrieval in both directions among the rows that have captions, with all their captions.

    A dataset with several languages has a result for each, whose candidates are the captions in that language and the
    images that have one, and last their unweighted average. Crossmodal-3600 is reported so; CLIP_benchmark uses the
    first caption of each image only.

    Arguments and errors as for `zero_shot_evaluation`, with captions for labels.
    """
    if not dataset.captions:
        raise UserError(
            f"dataset {dataset.path} has no captions for retrieval; choose a dataset with captions"
        )
    counts = (n for block in dataset.iter_blocks() for n in block.captions)
    _check_rows(dataset, {row for row, n in enumerate(counts) if n}, invalid, "a caption")
    return partial(_retrieval, dataset)


def _zero_shot(
    dataset: Dataset, task: ZeroShotSet, rows: np.ndarray, images: np.ndarray, embed_text: EmbedText
) -> list[dict[str, Any]]:
    pairs = np.isin(task.row_of, rows)
    labelled, image_of = np.unique(task.row_of[pairs], return_inverse=True)
    class_of, count = task.class_of[pairs], len(task.classnames)
    if len(labelled) < len(rows):  # otherwise a copy would double the memory of the embeddings
        images = images[np.searchsorted(rows, labelled)]
    classes = classifier(task.classnames, task.templates, embed_text)
    _check_finite(dataset, images, classes)
    image_ranks = ranks(images, classes, image_of, class_of)
    labels = np.full(len(images), -1) if task.multilabel else class_of
    counts = {
        "images": len(images),
        "classes": count,
        "templates": len(task.templates),
        "template_set": task.template_set,
        **task.overrides,
    }
    statistics, table = partial(accuracies, count), accuracy_table(image_ranks, labels)
    figures, intervals = point_estimates(statistics, table), bootstrap(statistics, table)
    chance = chance_accuracies(count, np.bincount(image_of) if task.multilabel else None)
    return [_result(dataset, "zeroshot_classification", "en", counts, figures, intervals, chance)]


def _retrieval(
    dataset: Dataset, rows: np.ndarray, images: np.ndarray, embed_text: EmbedText
) -> list[dict[str, Any]]:
    captions = captions_by_language(dataset, rows)
    counts: list[dict[str, Any]] = []
    tables, chances = [], []
    for pairs in captions.values():
        captioned, owner = np.unique([image for image, _ in pairs], return_inverse=True)
        texts = embed_text([text for _, text in pairs])
        _check_finite(dataset, images[captioned], texts)
        table = np.zeros((len(images), COLUMNS), np.int64)
        table[captioned] = recall_table(*retrieval_ranks(images[captioned], texts, owner), owner)
        tables.append(table)
        chances.append(chance_recalls(np.bincount(owner)))
        counts.append({"images": len(captioned), "texts": len(texts)})
    names, table = list(captions), np.concatenate(tables, axis=1)
    table = table[table.any(axis=1)]
    if len(names) > 1:
        total = sum(len(pairs) for pairs in captions.values())
        counts.append({"images": len(table), "texts": total, "languages": list(captions)})
        chances.append({metric: float(np.mean([c[metric] for c in chances])) for metric in chances[0]})
        names.append(AVERAGE)
    statistics = partial(_recalls, names)
    figures, intervals = point_estimates(statistics, table), bootstrap(statistics, table)
    return [
        _result(
            dataset,
            "zeroshot_retrieval",
            language,
            count,
            {metric: figures[f"{language}/{metric}"] for metric in chance},
            {metric: intervals[f"{language}/{metric}"] for metric in chance},
            chance,
        )
        for language, count, chance in zip(names, counts, chances, strict=True)
    ]


def captions_by_language(dataset: Dataset, rows: np.ndarray) -> dict[str, list[tuple[int, str]]]:
    """Return (index in `rows`, caption) of all captions by language.

    If no language is known, all captions are "en", as in CLIP_benchmark; if some are, the others are "und", which is
    ISO 639's code for undetermined.
    """
    index = {row: i for i, row in enumerate(rows.tolist())}
    unknown = "und" if dataset.languages else "en"
    found: dict[str, list[tuple[int, str]]] = {}
    for b, (block, lists) in enumerate(zip(dataset.iter_blocks(), dataset.iter_captions(), strict=True)):
        for i, texts in enumerate(lists):
            image = index.get(b * BLOCK + i)
            if image is None:
                continue
            languages = (block.languages[i] if block.languages else ()) or [""] * len(texts)
            for text, language in zip(texts, languages, strict=True):
                found.setdefault(language or unknown, []).append((image, text))
    return dict(sorted(found.items()))


def _recalls(languages: Sequence[str], rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return recalls by `language/metric`; the last of several languages is the average of the others."""
    sums = (weights @ rows.astype(np.float64)).reshape(len(weights), -1, COLUMNS)
    by_language = [recalls(sums[:, i]) for i in range(sums.shape[1])]
    if len(languages) > 1:
        with np.errstate(invalid="ignore"):
            metrics = by_language[0]
            by_language.append(
                {m: np.nanmean([values[m] for values in by_language], axis=0) for m in metrics}
            )
    return {
        f"{language}/{metric}": value
        for language, values in zip(languages, by_language, strict=True)
        for metric, value in values.items()
    }


def _check_rows(dataset: Dataset, rows: set[int], invalid: InvalidRows, required: str) -> None:
    if not rows.difference(invalid()):
        raise UserError(
            f"dataset {dataset.path} has no image with both {required} and a valid feature; choose another"
        )


def _check_finite(dataset: Dataset, images: np.ndarray, texts: np.ndarray) -> None:
    # All comparisons with NaN are false, so its rank would be the best.
    if not np.isfinite(images).all():
        raise UserError(f"image embeddings of {dataset.path} are not finite; embed the dataset again")
    if not np.isfinite(texts).all():
        raise UserError(
            f"text embeddings of {dataset.path} are not finite; evaluate another checkpoint with --step N"
        )


def _result(
    dataset: Dataset,
    task: str,
    language: str,
    counts: dict[str, Any],
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
        **counts,
        "chance": chance,
        "interval_95": intervals,
    }


def distinct_names(locations: Iterable[StrPath]) -> list[str]:
    """Return the names of directories, with the parent's where two directories have the same name."""
    resolved = [absolute(location) for location in locations]
    count = Counter(name(location) for location in set(resolved))
    return [
        name(location) if count[name(location)] == 1 else f"{name(parent(location))}/{name(location)}"
        for location in resolved
    ]
