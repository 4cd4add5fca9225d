"""Reading a run's `metrics.jsonl`, and what its lines say about the whole run.

Every line has "step", the number of completed updates, and one of

    training    "loss" and the other figures of the step; since the line before "pairs_per_second",
                "seconds_per_step", "data_wait_share" (0 to 1) and, on known chips, "mfu" (0 to 1); since the run
                began "elapsed_seconds" and "chip_hours"
    evaluation  figures named "<dataset>/<metric>", 0 to 1, the higher the better
    a restart   "elapsed_seconds" and "chip_hours" of the parts before, "step" the one that it goes on after

What is not a finite number is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from lit_fast.storage.files import is_file, read_bytes
from lit_fast.storage.paths import StrPath

Lines = list[dict[str, Any]]

_SPEED = ("seconds_per_step", "pairs_per_second", "data_wait_share", "mfu")


class Spent(NamedTuple):
    """What a run has taken so far, all its parts added up."""

    seconds: float = 0.0  # wall clock; compilation, evaluation and repeated steps included
    chip_hours: float = 0.0  # the same, times the devices there were


class Best(NamedTuple):
    """The best value of a figure and when it was reached."""

    value: float
    step: int


def read_metrics(path: StrPath) -> Lines:
    """The lines of a `metrics.jsonl` up to the first that is not whole: a killed run tears its last one."""
    lines = []
    data = read_bytes(path) if is_file(path) else b""
    for text in data.decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            break
        lines.append(line)
    return lines


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(lines: Lines, name: str, *, hours: bool = False) -> list[tuple[float, float]]:
    """(step, value) or (hours since the run began, value), wherever the figure is there and finite."""
    points, elapsed = [], 0.0
    for line in lines:
        if is_number(line.get("elapsed_seconds")):
            elapsed = line["elapsed_seconds"]  # an evaluation's line comes after its step's
        if is_number(line.get(name)):
            points.append((elapsed / 3600 if hours else line["step"], line[name]))
    return points


def names(lines: Lines) -> list[str]:
    """The figures that occur, in the order in which they first do."""
    found: dict[str, None] = {}
    for line in lines:
        found |= dict.fromkeys(line)
    return [name for name in found if name != "step"]


def evaluations(lines: Lines) -> list[dict[str, Any]]:
    """Per evaluated step `{"step", "figures"}`; the names of figures of an evaluation have a slash."""
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        figures = {name: value for name, value in line.items() if "/" in name and is_number(value)}
        if figures:
            found.setdefault(line["step"], {}).update(figures)
    return [{"step": step, "figures": figures} for step, figures in found.items()]


def best(lines: Lines) -> dict[str, Best]:
    """The highest value of every figure of the evaluations, the first of equal ones."""
    found: dict[str, Best] = {}
    for evaluation in evaluations(lines):
        for name, value in evaluation["figures"].items():
            if name not in found or value > found[name].value:
                found[name] = Best(value, evaluation["step"])
    return found


def speed(lines: Lines) -> dict[str, float]:
    """Means of the figures of speed over the steps, each step once; those that were never recorded are left out.

    Compilation, evaluation and saving are not in them.
    """
    seconds = dict.fromkeys(_SPEED, 0.0)
    steps = dict.fromkeys(_SPEED, 0.0)
    sums = dict.fromkeys(_SPEED, 0.0)
    before = 0
    for line in lines:
        count = line["step"] - before
        before = line["step"]
        if count <= 0 or not is_number(line.get("seconds_per_step")):
            continue
        took = count * line["seconds_per_step"]
        for name in _SPEED:
            if is_number(line.get(name)):
                seconds[name] += took
                steps[name] += count
                sums[name] += took * line[name]
    means = {name: sums[name] / seconds[name] for name in _SPEED if seconds[name] > 0}
    if means:  # the mean over the steps, not over the time
        means["seconds_per_step"] = seconds["seconds_per_step"] / steps["seconds_per_step"]
    return means


def spent(lines: Iterable[dict[str, Any]]) -> Spent:
    """The most that any line, or receipt, knows of."""
    known = [
        Spent(line["elapsed_seconds"], line["chip_hours"])
        for line in lines
        if is_number(line.get("elapsed_seconds")) and is_number(line.get("chip_hours"))
    ]
    return max(known, default=Spent())
