"""Evaluation results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lit_fast.evaluation.evaluate import AVERAGE, SETTINGS
from lit_fast.utils.format import format_table

_TASKS = {
    "zeroshot_classification": "zero-shot",
    "zeroshot_retrieval": "retrieval",
    "few_shot_classification": "few-shot",
}
_HEADER = ("dataset", "task", "metric", "%", "95 % interval", "chance")


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """Return a table in percent, and below it a line per result with its counts."""
    names = _names(results)
    rows = [_HEADER, *(row for n, r in zip(names, results, strict=True) for row in _rows(n, r))]
    return "\n".join([format_table(rows, left=(0, 1, 2)), "", *map(_counts, names, results)])


def without_languages(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the results of single languages where their average is present."""
    averaged = _averaged(results)
    return [r for r in results if r["language"] == AVERAGE or (r["dataset"], r["task"]) not in averaged]


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the datasets, with the language where there are several, and with the few-shot training set."""
    averaged = _averaged(results)
    return [
        r["dataset"]
        + (f" {r['language']}" if (r["dataset"], r["task"]) in averaged else "")
        + (f" from {r['train_dataset']}" if "train_dataset" in r else "")
        for r in results
    ]


def _averaged(results: Sequence[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(r["dataset"], r["task"]) for r in results if r["language"] == AVERAGE}


def _rows(name: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
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


def _counts(name: str, result: dict[str, Any]) -> str:
    counts = [f"{k} {result[k]:,}" for k in ("images", "texts", "classes", "templates") if k in result]
    counts += [f"{k.replace('_', ' ')} {result[k]}" for k in SETTINGS if k in result]
    skipped = result["rows"] - result["images"]
    missing = "label" if "classes" in result else "caption"
    note = f"; {skipped:,} rows without {missing} or valid image were skipped" if skipped else ""
    return f"{name} {_TASKS[result['task']]}: {', '.join(counts)}{note}"
