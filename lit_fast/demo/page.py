"""The demo's result as one HTML page: figures, curves, pictures found by sentences, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_fast.report.charts import Panel, Series, chart
from lit_fast.report.figures import figures_table
from lit_fast.report.gallery import Figure
from lit_fast.report.page import Cell, Table, render
from lit_fast.runs.metrics import curve
from lit_fast.utils.format import format_duration

Query = tuple[str, list[Figure]]
"""A sentence and the pictures that it found."""

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
    """Return the evaluations during training as lines, with the chance levels of the results."""
    chances = {f"{r['dataset']}/{metric}": chance for r in results for metric, chance in r["chance"].items()}
    out = []
    for name, chance in chances.items():
        label = _CURVES.get(name.rpartition("/")[2])
        points = curve(list(metrics), name)
        if points and label:
            out.append(Series(label, points, chance))
    return out


def _group(result: dict[str, Any]) -> str:
    counts = [f"{result[key]:,} {key}" for key in ("images", "texts", "classes") if key in result]
    return f"{result['dataset']}: {', '.join(counts)}"


def _confusion(name: str, shares: dict[str, float]) -> tuple[str | Cell, ...]:
    others = [f"{other} {100 * share:.0f} %" for other, share in shares.items() if other != name]
    rest = f", {len(others) - _MAX_CONFUSIONS} more" if len(others) > _MAX_CONFUSIONS else ""
    named = Cell(f"{100 * shares.get(name, 0.0):.0f} %", "number strong")
    return name, named, Cell(", ".join(others[:_MAX_CONFUSIONS]) + rest)
