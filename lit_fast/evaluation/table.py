"""Results of evaluations as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lit_fast.evaluation.evaluate import AVERAGE, SETTINGS

_TASKS = {
    "zeroshot_classification": "zero-shot",
    "zeroshot_retrieval": "retrieval",
    "few_shot_classification": "few-shot",
}


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """Results as a table in percent, a line on what was counted under it."""
    header = ("dataset", "task", "metric", "%", "95 % interval", "chance")
    names = _names(results)
    table = [header, *(line for n, r in zip(names, results, strict=True) for line in _lines(n, r))]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    return "\n".join([*text, "", *map(_counted, names, results)])


def without_languages(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results but for those of single languages, where their average is there too."""
    averaged = _averaged(results)
    return [r for r in results if r["language"] == AVERAGE or (r["dataset"], r["task"]) not in averaged]


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    """The datasets, with the language where there are several, and with what was learnt from."""
    averaged = _averaged(results)
    return [
        r["dataset"]
        + (f" {r['language']}" if (r["dataset"], r["task"]) in averaged else "")
        + (f" from {r['train_dataset']}" if "train_dataset" in r else "")
        for r in results
    ]


def _averaged(results: Sequence[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(r["dataset"], r["task"]) for r in results if r["language"] == AVERAGE}


def _lines(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for metric, value in result["metrics"].items():
        low, high = result["interval_95"][metric]
        yield (
            name,
            _TASKS[result["task"]],
            metric,
            f"{100 * value:.1f}",
            f"{100 * low:5.1f} - {100 * high:5.1f}",
            f"{100 * result['chance'][metric]:.1f}",
        )


def _counted(name: str, result: dict[str, Any]) -> str:
    counted = [what for what in ("images", "texts", "classes", "templates") if what in result]
    numbers = [f"{what} {result[what]:,}" for what in counted]
    named = [f"{what.replace('_', ' ')} {result[what]}" for what in SETTINGS if what in result]
    left = result["rows"] - result["images"]
    without = "label" if "classes" in result else "caption"
    skipped = f"; {left:,} rows without {without} or valid image were skipped" if left else ""
    return f"{name} {_TASKS[result['task']]}: {', '.join(numbers + named)}{skipped}"
