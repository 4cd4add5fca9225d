"""Several runs side by side: their settings, their cost and their results.

Everything is read from `config.toml`, `metrics.jsonl` and, where there is one, `receipt.json`, so runs in progress
and runs that were killed can be compared as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_fast.config_io import read_toml
from lit_fast.errors import UserError
from lit_fast.report.charts import TITLES, Panel, Series, panel, title
from lit_fast.report.page import Table, render
from lit_fast.runs.metrics import (
    Best,
    Lines,
    RunCost,
    best,
    curve,
    evaluations,
    mean_speed,
    metric_names,
    read_metrics,
    run_cost,
)
from lit_fast.storage import paths
from lit_fast.storage.files import exists, is_file
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_object
from lit_fast.utils.format import format_duration, format_table

_NONE = "-"
_SPEED_FORMATS = {
    "pairs_per_second": ",.0f",
    "images_per_second": ",.0f",
    "seconds_per_step": ".4g",
    "mfu": ".3f",
    "data_wait_share": ".4f",
}


@dataclass(frozen=True)
class Record:
    """The files of a run, read.

    Attributes:
      name: of its directory; its path where another run has the same name.
      path: of its directory.
      status: "finished", "stopped", or "unfinished" (in progress or killed).
      steps: completed, and in all.
      devices: count and kind; "-" if unknown.
      memory: as in the receipt, or empty.
      config: its configuration by dotted keys.
      cost: time and chip-hours.
      speed: means over the steps, see `lit_fast.runs.metrics.mean_speed`.
      final: the figures of the last evaluation.
      best: the best value of each figure.
      lines: of `metrics.jsonl`.
    """

    name: str
    path: str
    status: str
    steps: tuple[int, int]
    devices: str
    memory: dict[str, Any]
    config: dict[str, Any]
    cost: RunCost
    speed: dict[str, float]
    final: dict[str, float]
    best: dict[str, Best]
    lines: Lines


def read_record(path: StrPath) -> Record:
    """Read a run's directory.

    Raises:
      UserError: it is not a run, or a file in it is damaged.
    """
    config = _read_config(path)
    lines = read_metrics(join(path, "metrics.jsonl"))
    done = max((line["step"] for line in lines), default=0)
    file = join(path, "receipt.json")
    receipt = read_object(file, "status", "steps_done", "hardware", memory=dict) if is_file(file) else {}
    try:
        current = bool(receipt) and receipt["steps_done"] >= done
        hardware = receipt.get("hardware", {})
        devices = f"{hardware['devices']} x {hardware['device_kind']}" if hardware else _NONE
    except (KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete it, the metrics suffice") from None
    evaluated = evaluations(lines)
    return Record(
        name=paths.name(paths.absolute(path)),
        path=join(path),
        status=str(receipt["status"]) if current else "unfinished",
        steps=(receipt["steps_done"] if current else done, config["steps"]),
        devices=devices,
        memory=receipt.get("memory", {}),
        config=config,
        cost=run_cost([*lines, receipt]),
        speed=mean_speed(lines),
        final=evaluated[-1]["figures"] if evaluated else {},
        best=best(lines),
        lines=lines,
    )


def _read_config(path: StrPath) -> dict[str, Any]:
    file = join(path, "config.toml")
    if not is_file(file):
        problem = "is not a run (no config.toml)" if exists(path) else "does not exist"
        raise UserError(f"{path} {problem}; give directories that lit-fast train made")
    config = json.loads(json.dumps(read_toml(file), default=str))  # TOML has dates, JSON does not
    if type(config.get("steps")) is not int:
        raise UserError(f"{file} is damaged: steps is not a whole number; restore it")
    return config


def read_records(paths: Sequence[StrPath]) -> list[Record]:
    """Read runs; those of the same name get their paths for names.

    Raises:
      UserError: as `read_record`.
    """
    records = [read_record(path) for path in paths]
    run_names = [r.name for r in records]
    return [r if run_names.count(r.name) == 1 else replace(r, name=r.path) for r in records]


def differing(records: Sequence[Record]) -> list[str]:
    """Return the configuration keys whose values differ between the runs, sorted."""
    keys = sorted({key for r in records for key in r.config})
    return [k for k in keys if any(r.config.get(k) != records[0].config.get(k) for r in records)]


def as_json(records: Sequence[Record]) -> dict[str, Any]:
    """Return the comparison as plain values: times in seconds, shares and figures from 0 to 1."""
    return {
        "differing": differing(records),
        "runs": [
            {
                "name": r.name,
                "path": r.path,
                "status": r.status,
                "steps_done": r.steps[0],
                "steps": r.steps[1],
                "devices": r.devices if r.devices != _NONE else None,
                "memory": r.memory or None,
                "elapsed_seconds": r.cost.seconds,
                "chip_hours": r.cost.chip_hours,
                **r.speed,
                "final": r.final,
                "best": {name: value._asdict() for name, value in r.best.items()},
                "config": r.config,
            }
            for r in records
        ],
    }


def table_rows(records: Sequence[Record]) -> list[list[str]]:
    """Return rows of a label and a cell per run: state, differing settings, cost, results."""
    rows = [
        ["status", *(r.status for r in records)],
        ["steps", *(f"{r.steps[0]:,} of {r.steps[1]:,}" for r in records)],
        ["devices", *(r.devices for r in records)],
        ["text.keep, in use", *(str(r.memory.get("keep", _NONE)) for r in records)],
        ["text.microbatches, in use", *(str(r.memory.get("parts", _NONE)) for r in records)],
    ]
    rows += [[key, *(str(r.config.get(key, _NONE)) for r in records)] for key in differing(records)]
    rows += [
        ["time", *(format_duration(r.cost.seconds) if r.cost.seconds else _NONE for r in records)],
        ["chip-hours", *(f"{r.cost.chip_hours:,.3f}" if r.cost.seconds else _NONE for r in records)],
    ]
    for name, form in _SPEED_FORMATS.items():
        if any(name in r.speed for r in records):
            rows.append([name, *(format(r.speed[name], form) if name in r.speed else _NONE for r in records)])
    for name in _by_dataset(name for r in records for name in r.best):
        rows.append([f"{name}, final %", *(_percent(r.final.get(name)) for r in records)])
        rows.append([f"{name}, best %", *(_best(r.best.get(name)) for r in records)])
    return rows


def _by_dataset(figures: Iterable[str]) -> list[str]:
    """Return each name once, sorted by dataset; the order within a dataset is kept."""
    return sorted(dict.fromkeys(figures), key=lambda name: name.rpartition("/")[0])


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _best(value: Best | None) -> str:
    return _NONE if value is None else f"{100 * value.value:.1f} at {value.step:,}"


def format_comparison(records: Sequence[Record], width: int) -> str:
    """Return tables for a terminal of `width` columns, each with as many runs as fit."""
    rows = [("", *(r.name for r in records)), *table_rows(records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    groups: list[list[int]] = []
    free = 0
    for column, size in enumerate(widths[1:], 1):
        if not groups or free < size + 2:
            groups.append([])
            free = width - widths[0]
        groups[-1].append(column)
        free -= size + 2
    return "\n\n".join(
        format_table([[row[0], *(row[i] for i in group)] for row in rows], left=(0,)) for group in groups
    )


def comparison_page(
    records: Sequence[Record],
    heading: str = "lit-fast compare",
    ranking: Table | None = None,
    verdict: str = "",
) -> str:
    """Render the table and the overlaid curves of all runs as one HTML page, after a ranking if there is one.

    The figures of all evaluations have one vertical axis.
    """
    recorded = dict.fromkeys(name for r in records for name in metric_names(r.lines))
    evaluated = _by_dataset(name for name in recorded if "/" in name)
    results = [y for name in evaluated for r in records for _, y in curve(r.lines, name)]

    def draw(name: str, *, hours: bool = False) -> Panel:
        series = [Series(r.name, curve(r.lines, name, hours=hours)) for r in records]
        heading = title(name) + (", against hours" if hours else "")
        return panel(heading, name, series, hours=hours, covers=results if name in evaluated else ())

    panels = [draw("loss", hours=True), *(draw(name) for name in TITLES if name in recorded)]
    for name in evaluated:
        panels += [draw(name), draw(name, hours=True)]
    run_names = [r.name for r in records]
    table = Table(("", *run_names), table_rows(records), "runs")
    return render(
        "compare.html",
        title=heading,
        names=run_names,
        ranking=ranking,
        verdict=verdict,
        table=table,
        panels=panels,
    )
