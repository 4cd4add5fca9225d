"""The figures of evaluation results as a table with intervals and chance levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lit_fast.evaluation.evaluate import SETTINGS
from lit_fast.report.page import Cell, Table, fragment, percent

LABELS = {
    "acc1": "first guess right",
    "acc5": "right among the first 5 guesses",
    "mean_per_class_recall": "recall, mean over the classes",
    **{f"image_retrieval_recall@{k}": f"caption to picture, recall@{k}" for k in (1, 5, 10)},
    **{f"text_retrieval_recall@{k}": f"picture to caption, recall@{k}" for k in (1, 5, 10)},
    **{f"acc1_{k}shot": f"{k} image{'s' * (k > 1)} per class" for k in (1, 5, 10, 25)},
}


# Counts of a result -> the word for one.
_COUNTED = {
    "images": "image",
    "texts": "text",
    "classes": "class",
    "templates": "template",
    "train_images": "train image",
}


def figures_section(title: str, results: Sequence[dict[str, Any]]) -> Markup:
    """Render the figures of one dataset: one result, or one per language."""
    last = results[-1]
    counts = [
        f"{last[key]:,} {(one if last[key] == 1 else key).replace('_', ' ')}"
        for key, one in _COUNTED.items()
        if key in last
    ]
    counts += [f"{key.replace('_', ' ')} {last[key]}" for key in SETTINGS if key in last]
    draws = " and over the draws of training images" if "seeds" in last else ""
    note = (
        f"{', '.join(counts)}. The tick on a bar is the chance level of blind guessing. Intervals are over the choice "
        f"of images{draws}, not over trainings."
    )
    groups = [r["language"] or r["dataset"] for r in results] if len(results) > 1 else [""]
    return fragment("figures.html", title=title, note=note, figures=figures_table(results, groups))


def figures_table(results: Sequence[dict[str, Any]], groups: Sequence[str], classes: str = "") -> Table:
    """Return the figures of results, each below the heading of its group where that is not empty."""
    draws = any("seeds" in result for result in results)
    bars, interval = Cell(classes="bars"), Cell("95 % interval", "number range")
    rows: list[list[str | Cell]] = []
    for group, result in zip(groups, results, strict=True):
        if group:
            rows.append([group])
        for name, value in result["metrics"].items():
            low, high = result["interval_95"][name]
            chance = result["chance"][name]
            row: list[str | Cell] = [Cell(LABELS.get(name, name), title=name), percent(value)]
            if draws:
                row.append(", ".join(f"{100 * v:.1f}" for v in result["seeds"][name]))
            row.append(interval._replace(text=f"{100 * low:.1f} to {100 * high:.1f} %"))
            rows.append([*row, percent(chance), bars._replace(bar=(value, chance))])
    return Table(("figure", "reached", *(["draws"] * draws), interval, "chance", bars), rows, classes)
