"""Read a run's `metrics.jsonl` and summarize it.

Every line has "step", the number of completed updates, and belongs to one of three kinds:

    training    "loss" and other figures of the step; since the previous line "pairs_per_second",
                "seconds_per_step", "data_wait_share" (0 to 1), with a trained image tower "images_per_second" and, on
                known chips, "mfu" (0 to 1); since the start of the run "elapsed_seconds" and "chip_hours"; since this
                process started "unreadable_images", rows that it replaced by others
    evaluation  figures named "<dataset>/<metric>", 0 to 1, higher is better
    restart     "elapsed_seconds" and "chip_hours" until the restart; "step" is the step that was restored

Values that are not finite numbers are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from lit_fast.storage.files import is_file, read_bytes
from lit_fast.storage.paths import StrPath

Lines = list[dict[str, Any]]

_SPEED = ("seconds_per_step", "pairs_per_second", "images_per_second", "data_wait_share", "mfu")


class RunCost(NamedTuple):
    """The time that a run has taken, over all its restarts."""

    seconds: float = 0.0  # wall clock; compilation, evaluation and repeated steps included
    chip_hours: float = 0.0  # wall clock times the number of devices


class Best(NamedTuple):
    """The best value of a metric and its step."""

    value: float
    step: int


def read_metrics(location: StrPath) -> Lines:
    """Return the lines of a `metrics.jsonl` up to the first incomplete one, which a killed run may leave."""
    lines: Lines = []
    data = read_bytes(location) if is_file(location) else b""
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
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(lines: Lines, name: str, *, hours: bool = False) -> list[tuple[float, float]]:
    """Return (step, value), or (hours since the start, value), of every line with a finite figure `name`."""
    points, elapsed = [], 0.0
    for line in lines:
        if is_number(line.get("elapsed_seconds")):
            elapsed = line["elapsed_seconds"]  # the line of an evaluation follows that of its step
        if is_number(line.get(name)):
            points.append((elapsed / 3600 if hours else line["step"], line[name]))
    return points


def metric_names(lines: Lines) -> list[str]:
    """Return the names of all figures in the order of their first occurrence."""
    found: dict[str, None] = {}
    for line in lines:
        found |= dict.fromkeys(line)
    return [name for name in found if name != "step"]


def evaluations(lines: Lines) -> list[dict[str, Any]]:
    """Return `{"step", "figures"}` of every evaluated step; only names of evaluation figures have a slash."""
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        figures = {name: value for name, value in line.items() if "/" in name and is_number(value)}
        if figures:
            found.setdefault(line["step"], {}).update(figures)
    return [{"step": step, "figures": figures} for step, figures in found.items()]


def best(lines: Lines) -> dict[str, Best]:
    """Return the highest value of every evaluation figure; of equal values the first."""
    found: dict[str, Best] = {}
    for evaluation in evaluations(lines):
        for name, value in evaluation["figures"].items():
            if name not in found or value > found[name].value:
                found[name] = Best(value, evaluation["step"])
    return found


def mean_speed(lines: Lines) -> dict[str, float]:
    """Return the means of the recorded figures of speed, each step counted once.

    Compilation, evaluation and checkpoints are not included. "seconds_per_step" is the mean over steps, the other
    figures are means over time.
    """
    spans, total_steps, previous = [], 0, 0
    for line in lines:
        steps, previous = line["step"] - previous, line["step"]
        if steps > 0 and is_number(line.get("seconds_per_step")):
            spans.append((steps * line["seconds_per_step"], line))
            total_steps += steps
    means = {}
    for name in _SPEED:
        known = [(seconds, line[name]) for seconds, line in spans if is_number(line.get(name))]
        if time := sum(seconds for seconds, _ in known):
            means[name] = sum(seconds * value for seconds, value in known) / time
    if means:
        means["seconds_per_step"] = sum(seconds for seconds, _ in spans) / total_steps
    return means


def run_cost(lines: Iterable[dict[str, Any]]) -> RunCost:
    """Return the highest cost recorded in any of the lines or receipts."""
    known = [
        RunCost(line["elapsed_seconds"], line["chip_hours"])
        for line in lines
        if is_number(line.get("elapsed_seconds")) and is_number(line.get("chip_hours"))
    ]
    return max(known, default=RunCost())
