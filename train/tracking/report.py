"""A run as one HTML page: figures, curves, receipt and configuration."""

from __future__ import annotations

import re
from typing import Any

from lit_fast.report.charts import TITLES, Panel, Series, panel, title
from lit_fast.report.page import Table, percent, render
from lit_fast.runs.metrics import Lines, curve, metric_names, read_metrics
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import read_bytes
from lit_fast.storage.paths import StrPath, absolute, join, name
from lit_fast.storage.text_files import read_object
from lit_fast.utils.format import format_duration

_SPREAD = re.compile(r"(.+)_(min|mean|max)")
# In the receipt already, or the inverse of a metric that has a chart.
_NO_CHART = ("elapsed_seconds", "chip_hours", "seconds_per_step")


def write_report(run: StrPath) -> None:
    """Write `report.html` from the receipt, metrics and configuration of a run."""
    receipt = read_object(join(run, "receipt.json"), "status", "evaluation")
    lines = read_metrics(join(run, "metrics.jsonl"))
    duration = format_duration(receipt["elapsed_seconds"])
    page = render(
        "run.html",
        title=name(absolute(run)),
        summary=f"{receipt['status']}: {receipt['steps_done']:,} of {receipt['steps']:,} steps in {duration}, "
        f"{receipt['pairs_seen']:,} pairs",
        figures=_figures(receipt["evaluation"]),
        evaluation=_evaluation_charts(lines),
        training=_training_charts(lines),
        receipt=Table((), _receipt_rows(receipt)),
        config=read_bytes(join(run, "config.toml")).decode(),
    )
    write_atomic(join(run, "report.html"), page.encode("utf-8", "replace"))


def _training_charts(lines: Lines) -> list[Panel]:
    """Draw a chart per metric, and one for the minimum, mean and maximum of a metric."""
    recorded = [n for n in metric_names(lines) if "/" not in n and n not in _NO_CHART and curve(lines, n)]
    spreads = dict.fromkeys(match[1] for n in recorded if (match := _SPREAD.fullmatch(n)))
    single = [n for n in recorded if not _SPREAD.fullmatch(n)]
    order = {name: i for i, name in enumerate(TITLES)}
    single.sort(key=lambda n: order.get(n, len(order)))
    panels = [panel(title(n), n, [Series(n, curve(lines, n))]) for n in single]
    for stem in spreads:
        series = [Series(end, curve(lines, f"{stem}_{end}")) for end in ("max", "mean", "min")]
        panels.append(panel(title(stem), stem, series))
    return panels


def _evaluation_charts(lines: Lines) -> list[Panel]:
    """Draw two charts per evaluated dataset, against steps and against hours, with one vertical axis."""
    figures = [n for n in metric_names(lines) if "/" in n]
    results = [y for n in figures for _, y in curve(lines, n)]
    panels = []
    for dataset in dict.fromkeys(n.rpartition("/")[0] for n in figures):
        own = [n for n in figures if n.rpartition("/")[0] == dataset]
        for hours in (False, True):
            series = [Series(n.rpartition("/")[2], curve(lines, n, hours=hours)) for n in own]
            heading = f"{dataset if len(own) > 1 else own[0]}, against {'hours' if hours else 'steps'}"
            panels.append(panel(heading, own[0], series, hours=hours, covers=results))
    return panels


def _figures(evaluation: dict[str, Any]) -> Table:
    final = evaluation["final"]["figures"] if evaluation["final"] else {}
    rows = [
        (n, percent(final[n]) if n in final else "", percent(best["value"]), f"{best['step']:,}")
        for n, best in evaluation["best"].items()
    ]
    return Table(("figure", "final", "best", "at step"), rows)


def _receipt_rows(receipt: dict[str, Any]) -> list[tuple[str, str]]:
    hardware, memory = receipt["hardware"], receipt["memory"]
    needed = f"{memory['bytes'] / 2**30:.2f} of {memory['limit_bytes'] / 2**30:.2f}, by {memory['bytes_by']}"
    rows = [
        ("status", receipt["status"]),
        ("steps", f"{receipt['steps_done']:,} of {receipt['steps']:,}"),
        ("pairs seen", f"{receipt['pairs_seen']:,}"),
        ("time, all parts of the run", format_duration(receipt["elapsed_seconds"])),
        ("chip-hours", f"{receipt['chip_hours']:,.2f}"),
        ("text.keep, in use", memory["keep"]),
        ("text.microbatches, in use", str(memory["parts"])),
        ("needed memory of a device, GiB", needed),
    ]
    if image := receipt.get("image_tower"):
        start = f" from {image['source']}" if image["train"] == "unlocked" else ""
        rows.insert(5, ("image tower", f"{image['train']}{start}"))
    for key, label in (("image_keep", "image.keep, in use"), ("image_parts", "image.microbatches, in use")):
        if key in memory:
            rows.append((label, str(memory[key])))
    for key, label, scale, form in (
        ("pairs_per_second", "pairs per second", 1, ",.0f"),
        ("images_per_second", "decoded images per second", 1, ",.0f"),
        ("seconds_per_step", "seconds per step", 1, ".4g"),
        ("mfu", "MFU, %", 100, ".1f"),
        ("data_wait_share", "waiting for data, %", 100, ".2f"),
        ("peak_device_memory_bytes", "peak memory of a device, GiB", 2**-30, ".2f"),
        ("peak_process_memory_bytes", "peak memory of the process, GiB", 2**-30, ".2f"),
    ):
        if key in receipt:
            rows.append((label, format(scale * receipt[key], form)))
    rows += [
        ("devices", f"{hardware['devices']} x {hardware['device_kind']}"),
        ("processes", f"{hardware['processes']:,}"),
        ("host", f"{hardware['host_cpu']}, {hardware['host_cores']} cores"),
    ]
    rows += [(f"version of {package}", version) for package, version in receipt["versions"].items()]
    if git := receipt.get("git"):
        rows.append(("commit", f"{git['commit']}, with local changes" if git["dirty"] else git["commit"]))
    rows += [(f"identity of the {part}", str(digest)) for part, digest in receipt["digests"].items()]
    return rows
