"""Several runs side by side: what was set differently, what it took, what came out.

Everything is read from `config.toml`, `metrics.jsonl` and, where there is one, `receipt.json`, so runs that are
at work or were killed can be compared as well.
"""

from __future__ import annotations

import html
import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_fast.config_io import flatten_toml
from lit_fast.errors import UserError
from lit_fast.report.charts import TITLES, Series, panel, title
from lit_fast.report.html import document, section, table
from lit_fast.runs.metrics import (
    Best,
    Lines,
    Spent,
    best,
    curve,
    evaluations,
    names,
    read_metrics,
    speed,
    spent,
)
from lit_fast.storage.files import read_object
from lit_fast.utils.progress import duration

_NONE = "-"
_SPEEDS = {"pairs_per_second": ",.0f", "seconds_per_step": ".4g", "mfu": ".3f", "data_wait_share": ".4f"}


@dataclass(frozen=True)
class Record:
    """What is known of a run."""

    name: str
    path: Path
    status: str  # "finished", "stopped", or "unfinished": at work or killed
    steps: tuple[int, int]  # done, wanted
    devices: str
    memory: dict[str, Any]  # as in the receipt; empty if that does not say
    config: dict[str, Any]
    spent: Spent
    speed: dict[str, float]
    final: dict[str, float]
    best: dict[str, Best]
    lines: Lines


def read_record(path: Path) -> Record:
    """Read a run's directory.

    Raises:
      UserError: it is not a run, or a file in it is damaged.
    """
    file = path / "config.toml"
    if not file.is_file():
        what = "is not a run (no config.toml)" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give directories that lit-fast train made")
    try:
        values = flatten_toml(tomllib.loads(file.read_text(encoding="utf-8")))
        config = json.loads(json.dumps(values, default=str))  # TOML knows dates, JSON does not
        wanted = int(config["steps"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    lines = read_metrics(path / "metrics.jsonl")
    done = max((line["step"] for line in lines), default=0)
    file = path / "receipt.json"
    receipt = read_object(file, "status", "steps_done", "hardware", memory=dict) if file.is_file() else {}
    try:
        current = bool(receipt) and receipt["steps_done"] >= done
        hardware = receipt.get("hardware", {})
        devices = f"{hardware['devices']} x {hardware['device_kind']}" if hardware else _NONE
    except (KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete it, the metrics are enough") from None
    tried = evaluations(lines)
    return Record(
        name=path.resolve().name,
        path=path,
        status=str(receipt["status"]) if current else "unfinished",
        steps=(receipt["steps_done"] if current else done, wanted),
        devices=devices,
        memory=receipt.get("memory", {}),
        config=config,
        spent=spent([*lines, receipt]),
        speed=speed(lines),
        final=tried[-1]["figures"] if tried else {},
        best=best(lines),
        lines=lines,
    )


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Read all; runs of the same name are called by their paths.

    Raises:
      UserError: as `read_record`.
    """
    records = [read_record(path) for path in paths]
    named = [r.name for r in records]
    return [r if named.count(r.name) == 1 else replace(r, name=str(r.path)) for r in records]


def differing(records: Sequence[Record]) -> list[str]:
    """The keys of the configurations that are not the same in all, sorted."""
    keys = sorted({key for r in records for key in r.config})
    return [k for k in keys if any(r.config.get(k) != records[0].config.get(k) for r in records)]


def as_json(records: Sequence[Record]) -> dict[str, Any]:
    """The comparison as plain values; times in seconds, shares and figures from 0 to 1."""
    return {
        "differing": differing(records),
        "runs": [
            {
                "name": r.name,
                "path": str(r.path),
                "status": r.status,
                "steps_done": r.steps[0],
                "steps": r.steps[1],
                "devices": r.devices if r.devices != _NONE else None,
                "memory": r.memory or None,
                "elapsed_seconds": r.spent.seconds,
                "chip_hours": r.spent.chip_hours,
                **r.speed,
                "final": r.final,
                "best": {name: found._asdict() for name, found in r.best.items()},
                "config": r.config,
            }
            for r in records
        ],
    }


def table_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Name of the row, then a cell per run: what it is, what differs, what it took, what came out."""
    figures = _by_dataset(name for r in records for name in r.best)

    def row(name: str, cell: Callable[[Record], str]) -> tuple[str, ...]:
        return (name, *map(cell, records))

    rows = [
        row("status", lambda r: r.status),
        row("steps", lambda r: f"{r.steps[0]:,} of {r.steps[1]:,}"),
        row("devices", lambda r: r.devices),
        row("text.keep, in use", lambda r: str(r.memory.get("keep", _NONE))),
        row("text.microbatches, in use", lambda r: str(r.memory.get("parts", _NONE))),
    ]
    for key in differing(records):
        rows.append(row(key, lambda r, key=key: str(r.config.get(key, _NONE))))  # type: ignore[misc]
    rows += [
        row("time", lambda r: duration(r.spent.seconds) if r.spent.seconds else _NONE),
        row("chip-hours", lambda r: f"{r.spent.chip_hours:,.3f}" if r.spent.seconds else _NONE),
    ]
    for name, form in _SPEEDS.items():
        if any(name in r.speed for r in records):
            cell = lambda r, n=name, f=form: format(r.speed[n], f) if n in r.speed else _NONE  # noqa: E731
            rows.append(row(name, cell))
    for name in figures:
        rows.append(row(f"{name}, final %", lambda r, n=name: _percent(r.final.get(n))))  # type: ignore[misc]
        rows.append(row(f"{name}, best %", lambda r, n=name: _best(r.best.get(n))))  # type: ignore[misc]
    return rows


def _by_dataset(figures: Iterable[str]) -> list[str]:
    """Each once, sorted by dataset, those of one dataset as they were recorded."""
    return sorted(dict.fromkeys(figures), key=lambda name: name.rpartition("/")[0])


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _best(found: Best | None) -> str:
    return _NONE if found is None else f"{100 * found.value:.1f} at {found.step:,}"


def format_comparison(records: Sequence[Record], width: int) -> str:
    """The table for a terminal of `width` columns; runs that do not fit stand in further tables below."""
    rows = [("", *(r.name for r in records)), *table_rows(records)]
    label = max(len(row[0]) for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(1, len(records) + 1)]
    groups: list[list[int]] = []
    room = 0
    for column, size in enumerate(widths, 1):
        if not groups or room < size + 2:
            groups.append([])
            room = width - label
        groups[-1].append(column)
        room -= size + 2
    blocks = [
        "\n".join(
            (f"{row[0]:{label}}" + "".join(f"  {row[i]:>{widths[i - 1]}}" for i in group)).rstrip()
            for row in rows
        )
        for group in groups
    ]
    return "\n\n".join(blocks)


def comparison_page(records: Sequence[Record]) -> str:
    """The table and the curves of all runs over each other, as one HTML page."""
    recorded = dict.fromkeys(name for r in records for name in names(r.lines))

    def drawn(name: str, *, hours: bool = False) -> str:
        series = [Series(r.name, curve(r.lines, name, hours=hours)) for r in records]
        return panel(title(name) + (", against hours" if hours else ""), name, series, hours=hours)

    panels = [drawn("loss", hours=True), *(drawn(name) for name in TITLES if name in recorded)]
    for name in _by_dataset(name for name in recorded if "/" in name):
        panels += [drawn(name), drawn(name, hours=True)]
    parts = [
        f"<header><h1>{html.escape(', '.join(r.name for r in records))}</h1></header>",
        section("Runs", table(("", *(r.name for r in records)), table_rows(records))),
        f'<section class="pair">{"".join(panels)}</section>',
    ]
    return document("lit-fast compare", parts)
