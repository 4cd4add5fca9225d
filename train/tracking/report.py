"""A run as one HTML page: its figures, its curves, its receipt."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from lit_fast.report.charts import TITLES, Series, panel, title
from lit_fast.report.html import document, section, table
from lit_fast.runs.metrics import Lines, curve, names, read_metrics
from lit_fast.storage.files import read_object, write_atomic
from lit_fast.utils.progress import duration

_SPREAD = re.compile(r"(.+)_(min|mean|max)")
# Said in the receipt, or another way round by a figure that has a chart.
_NOT_DRAWN = ("elapsed_seconds", "chip_hours", "seconds_per_step")


def write_report(run: Path) -> None:
    """Write `report.html` from the receipt, the metrics and the configuration in the directory."""
    receipt = read_object(run / "receipt.json", "status", "evaluation")
    lines = read_metrics(run / "metrics.jsonl")
    evaluation, training = _evaluation_charts(lines), _training_charts(lines)
    done = (
        f"{receipt['steps_done']:,} of {receipt['steps']:,} steps in {duration(receipt['elapsed_seconds'])}"
    )
    parts = [
        f"<header><h1>{html.escape(run.resolve().name)}</h1>"
        f"<p>{html.escape(receipt['status'])}: {done}, {receipt['pairs_seen']:,} pairs</p></header>"
    ]
    if evaluation:
        parts.append(section("Evaluation", _figures(receipt["evaluation"])))
        parts.append(f'<section class="pair">{evaluation}</section>')
    parts += [
        f'<section class="pair">{training}</section>',
        section("Receipt", table((), _receipt_rows(receipt)), "As in receipt.json."),
        section("Configuration", f"<pre>{html.escape((run / 'config.toml').read_text())}</pre>"),
    ]
    write_atomic(run / "report.html", document(run.resolve().name, parts).encode())


def _training_charts(lines: Lines) -> str:
    recorded = [n for n in names(lines) if "/" not in n and n not in _NOT_DRAWN and curve(lines, n)]
    spreads = dict.fromkeys(found[1] for n in recorded if (found := _SPREAD.fullmatch(n)))
    single = [n for n in recorded if not _SPREAD.fullmatch(n)]
    order = {name: place for place, name in enumerate(TITLES)}
    single.sort(key=lambda n: order.get(n, len(order)))
    panels = [panel(title(name), name, [Series(name, curve(lines, name))]) for name in single]
    for stem in spreads:
        series = [Series(end, curve(lines, f"{stem}_{end}")) for end in ("max", "mean", "min")]
        panels.append(panel(title(stem), stem, series))
    return "".join(panels)


def _evaluation_charts(lines: Lines) -> str:
    """Per evaluated dataset one chart against steps and one against hours."""
    figures = [n for n in names(lines) if "/" in n]
    panels = []
    for dataset in dict.fromkeys(n.rpartition("/")[0] for n in figures):
        own = [n for n in figures if n.rpartition("/")[0] == dataset]
        for hours in (False, True):
            series = [Series(n.rpartition("/")[2], curve(lines, n, hours=hours)) for n in own]
            heading = f"{dataset if len(own) > 1 else own[0]}, against {'hours' if hours else 'steps'}"
            panels.append(panel(heading, own[0], series, hours=hours))
    return "".join(panels)


def _figures(evaluation: dict[str, Any]) -> str:
    final = evaluation["final"]["figures"]
    rows = [
        (name, f"{100 * final[name]:.1f} %" if name in final else "", f"{100 * found['value']:.1f} %",
         f"{found['step']:,}")
        for name, found in evaluation["best"].items()
    ]  # fmt: skip
    return table(("figure", "final", "best", "at step"), rows)


def _receipt_rows(receipt: dict[str, Any]) -> list[tuple[str, str]]:
    hardware = receipt["hardware"]
    rows = [
        ("status", receipt["status"]),
        ("steps", f"{receipt['steps_done']:,} of {receipt['steps']:,}"),
        ("pairs seen", f"{receipt['pairs_seen']:,}"),
        ("time, all parts of the run", duration(receipt["elapsed_seconds"])),
        ("chip-hours", f"{receipt['chip_hours']:,.2f}"),
    ]
    memory = receipt["memory"]
    room = f"{memory['bytes'] / 2**30:.2f} of {memory['limit_bytes'] / 2**30:.2f}, by {memory['bytes_by']}"
    rows += [
        ("text.keep, in use", memory["keep"]),
        ("text.microbatches, in use", str(memory["parts"])),
        ("needed memory of a device, GiB", room),
    ]
    for name, label, scale, form in (
        ("pairs_per_second", "pairs per second", 1, ",.0f"),
        ("seconds_per_step", "seconds per step", 1, ".4g"),
        ("mfu", "MFU, %", 100, ".1f"),
        ("data_wait_share", "waiting for data, %", 100, ".2f"),
        ("peak_device_memory_bytes", "peak memory of a device, GiB", 2**-30, ".2f"),
        ("peak_process_memory_bytes", "peak memory of the process, GiB", 2**-30, ".2f"),
    ):
        if name in receipt:
            rows.append((label, format(scale * receipt[name], form)))
    rows += [
        ("devices", f"{hardware['devices']} x {hardware['device_kind']}"),
        ("processes", f"{hardware['processes']:,}"),
        ("host", f"{hardware['host_cpu']}, {hardware['host_cores']} cores"),
        *((f"version of {name}", number) for name, number in receipt["versions"].items()),
        *((f"identity of the {name}", str(digest)) for name, digest in receipt["digests"].items()),
    ]
    return rows
