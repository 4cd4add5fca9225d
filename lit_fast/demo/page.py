"""Render the demo's results as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_fast.data.dataset import open_dataset
from lit_fast.data.images.reader import ImageReader
from lit_fast.evaluation.zeroshot import classifier
from lit_fast.report.charts import Panel, Series, chart
from lit_fast.report.figures import figures_table
from lit_fast.report.gallery import Figure, nearest_images
from lit_fast.report.page import Cell, Table, render
from lit_fast.runs.metrics import curve
from lit_fast.runs.run import Run
from lit_fast.storage.paths import StrPath
from lit_fast.utils.format import format_duration

Query = tuple[str, list[Figure]]
"""A sentence and the pictures that it found."""

_MAX_QUERIES = 8  # sentences shown of each kind
_MAX_CONFUSIONS = 3  # names shown per class
# Metrics that are drawn over the steps -> names of the lines.
_CURVES = {
    "acc1": "named right",
    "image_retrieval_recall@1": "found first",
    "image_retrieval_recall@5": "in the first 5",
}


def build_page(
    metrics: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    right: Sequence[Query],
    wrong: Sequence[Query],
    confusions: Sequence[tuple[str, dict[str, float]]],
    commands: Sequence[str],
    seconds: float | None,
) -> str:
    """Render the page.

    Args:
      metrics: lines of metrics.jsonl, training ("step", "loss") and evaluation ("step", "<dataset>/<metric>").
      results: as `lit-fast eval --json` writes them.
      right: sentences whose own picture came first.
      wrong: sentences that found another picture first.
      confusions: per class its name and the share of its pictures by predicted name, largest first.
      commands: as typed.
      seconds: duration of the whole demo; None if it was resumed.
    """
    return render(
        "demo.html",
        title="lit-fast demo",
        duration=None if seconds is None else format_duration(seconds),
        figures=figures_table(results, [_group(result) for result in results], "brief"),
        panels=[
            Panel("Loss", chart([Series("loss", curve(list(metrics), "loss"))])),
            Panel(
                "Accuracy while training",
                chart(curves(metrics, results), percent=True),
                "Dotted: the chance levels.",
            ),
        ],
        right=right,
        wrong=wrong,
        confusions=Table(
            ("on the picture", "named so", Cell("otherwise named")), [_confusion(*c) for c in confusions]
        ),
        commands=commands,
    )


def curves(metrics: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> list[Series]:
    """Return the metrics of `_CURVES` over the steps, with their chance levels."""
    chances = {f"{r['dataset']}/{metric}": chance for r in results for metric, chance in r["chance"].items()}
    return [
        Series(label, points, chance)
        for name, chance in chances.items()
        if (label := _CURVES.get(name.rpartition("/")[2])) and (points := curve(list(metrics), name))
    ]


def gallery(run: Run, path: StrPath) -> tuple[list[Query], list[Query]]:
    """Sample sentences, at most one per picture.

    Returns:
      The sentences whose own picture is the nearest, and the other sentences.
    """
    dataset = open_dataset(path)
    read = ImageReader(dataset).read_or_none
    rows, images = run.image_embeddings(dataset)
    captions = [texts for block in dataset.iter_captions() for texts in block]
    owner = np.repeat(np.arange(len(rows)), [len(captions[row]) for row in rows])
    texts = [text for row in rows for text in captions[row]]
    scores = run.embed_text(texts) @ images.T
    right: list[Query] = []
    wrong: list[Query] = []
    used: set[int] = set()
    for query in np.random.default_rng(0).permutation(len(texts)).tolist():
        image = int(owner[query])
        queries = right if scores[query].argmax() == image else wrong
        if image not in used and len(queries) < _MAX_QUERIES:
            used.add(image)
            queries.append((texts[query], nearest_images(scores[query], image, rows, read)))
    return right, wrong


def confusions(run: Run, path: StrPath) -> list[tuple[str, dict[str, float]]]:
    """Return, per class, the shares of the predicted classes, largest first."""
    dataset = open_dataset(path)
    rows, images = run.image_embeddings(dataset)
    labels = np.concatenate([np.array(block.labels) for block in dataset.iter_blocks()])[rows]
    names = dataset.classnames
    predicted = (images @ classifier(names, dataset.templates, run.embed_text).T).argmax(axis=1)
    found = []
    for label in np.unique(labels).tolist():
        counts = np.bincount(predicted[labels == label], minlength=len(names))
        order = np.argsort(-counts, kind="stable")
        found.append((names[label], {names[k]: counts[k] / counts.sum() for k in order if counts[k]}))
    return found


def _group(result: dict[str, Any]) -> str:
    counts = [f"{result[key]:,} {key}" for key in ("images", "texts", "classes") if key in result]
    return f"{result['dataset']}: {', '.join(counts)}"


def _confusion(name: str, shares: dict[str, float]) -> tuple[str | Cell, ...]:
    others = [f"{other} {100 * share:.0f} %" for other, share in shares.items() if other != name]
    rest = f", {len(others) - _MAX_CONFUSIONS} more" if len(others) > _MAX_CONFUSIONS else ""
    named = Cell(f"{100 * shares.get(name, 0.0):.0f} %", "number strong")
    return name, named, Cell(", ".join(others[:_MAX_CONFUSIONS]) + rest)
