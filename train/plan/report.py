"""A plan as one page of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_fast.utils.format import format_bytes, format_duration, format_table

_RESOURCES = {
    "compute": "the chips' arithmetic",
    "memory bandwidth": "the memory's bandwidth",
    "interconnect": "the links between the chips",
}


def format_plan(plan: dict[str, Any]) -> str:
    """Return the page of a plan of `lit_fast.train.plan.plan.make_plan`."""
    parts = [_head(plan), _verdict(plan), _memory(plan), _step(plan), format_times(plan), _data(plan)]
    if plan["searched"]:
        parts.append(_candidates(plan))
    parts.append(_advice(plan))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _head(plan: dict[str, Any]) -> list[str]:
    data, chip = plan["data"], plan["chip"]
    if plan["by"] == "compiler":
        source = f"by the compiler, in {format_duration(plan['compile_seconds'])}"
    else:
        refused = plan["compiler_refuses"]
        source = "an analytic ESTIMATE: " + (
            "the compiler refuses the step" if refused else "no such device is here to compile for"
        )
    measured = "measured here" if chip["name"] == "cpu" else "data sheet"
    devices = f"{plan['devices']} x {chip['kind']}, {_si(chip['flops'])}FLOP/s each ({measured})"
    vocabulary = f"vocabulary of {data['vocab_size']:,}, {data['max_length']} tokens"
    return [
        f"{plan['topology']}: {devices}; {source}",
        f"{plan['steps']:,} steps of {plan['global_batch']:,} images, {plan['texts']:,} texts; text.keep "
        f"{plan['way']['description']}",
        f"{data['description']}, {data['width']} wide; {vocabulary}",
    ]


def _verdict(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    total, usable, limit = (format_bytes(memory[name]) for name in ("total", "room", "limit"))
    spare = memory["room"] - memory["total"]
    if memory["fits"]:
        verdict = f"FITS: {total} of {limit} per device; {format_bytes(spare)} to spare of {usable} usable"
    elif plan["compiler_refuses"]:
        verdict = f"DOES NOT FIT: the compiler refuses the step; a device has {limit}"
    else:
        verdict = (
            f"DOES NOT FIT: {total} per device, {format_bytes(-spare)} more than {usable} usable of {limit}"
        )
    if plan["topology"].startswith("gpu:") and plan["by"] == "estimate":
        return [
            verdict,
            "(75 % of the GPU's memory: JAX takes more only with XLA_PYTHON_CLIENT_MEM_FRACTION)",
        ]
    return [verdict]


def _memory(plan: dict[str, Any]) -> list[str]:
    labels = {
        "parameters": "parameters",
        "optimizer": "optimizer state",
        "batch": "batch",
        "kept": "residuals for backward pass",
        "temporaries": "other temporaries",
    }
    rows = [(label, format_bytes(plan["memory"][name]), "") for name, label in labels.items()]
    if plan["buffers"]:
        buffer = plan["buffers"][0]
        rows.append(("largest buffer", format_bytes(buffer["bytes"]), buffer["shape"]))
    return ["memory per device", *_table(rows, left={0, 2})]


def _step(plan: dict[str, Any]) -> list[str]:
    flops = plan["flops"]
    rows = [("model FLOPs", _si(flops["model"]), f"recomputation {flops['recompute']:+.1%}")]
    for name, collective in plan["collectives"].items():
        rows.append((name, _si(collective["bytes"]) + "B", f"in {collective['calls']:,}"))
    for name, seconds in plan["floors"].items():
        if seconds:  # one device has no interconnect
            limit = "<- limits the step" if name == plan["limit"] else ""
            rows.append((f"lower bound by {name}", _seconds(seconds), limit))
    return ["a step on one device", *_table(rows, left={0, 2})]


def format_times(plan: dict[str, Any]) -> list[str]:
    """Return the table of times: lower bound, compiler's estimate, two assumed MFUs."""
    labels = {
        "floor": f"lower bound, by {_RESOURCES[plan['limit']]}",
        "compiler": "compiler's estimate (no measurement)",
        "paper": "at 33 % MFU, the paper's",
        "stated": f"at {_percent(plan['mfu'])} MFU, assumed",
    }
    rows = [("time", "a step", "MFU", "whole run", *["USD"] * bool(plan["price"]), "images/s to stream", "")]
    for name, time in plan["times"].items():
        price = [f"{time['price']:,.{0 if time['price'] >= 100 else 2}f}"] if plan["price"] else []
        impossible = time["seconds"] < plan["times"]["floor"]["seconds"]
        rows.append(
            (
                labels[name],
                _seconds(time["seconds"]),
                f"{time['mfu']:.0%}",
                _hours(time["hours"]),
                *price,
                f"{time['rows_per_second']:,.0f}",
                "below the lower bound" if impossible else "",
            )
        )
    return _table(rows, left={0, len(rows[0]) - 1}, header=True)


def _data(plan: dict[str, Any]) -> list[str]:
    store, data = plan["store"], plan["data"]
    rows = f"{store['rows']:,} rows" if store["known"] else "a million rows (--plan.rows N sets the number)"
    share, rate = _percent(plan["mfu"]), plan["times"]["stated"]["rows_per_second"]
    passes = f"; {store['passes']:,.1f} epochs" if store["passes"] else ""
    lines = [
        f"features of {rows}: {_si(store['bytes'])}B{passes}",
        f"a streamed row has {store['row_bytes']:,} bytes: {_si(rate * store['row_bytes'])}B/s at {share} MFU",
    ]
    if store["embedding_seconds"] is not None:
        lines.append(
            f"embedding with {data['tower']}: {format_duration(store['embedding_seconds'])} at {share} of the peak "
            "(arithmetic only; decoding the images may take longer)"
        )
    return lines


def _candidates(plan: dict[str, Any]) -> list[str]:
    rows = [("candidates (text.keep, text.microbatches, text.pack)", "memory", "a step", "recomputation", "")]
    for candidate in plan["ways"]:
        recomputation = candidate["executed_flops"] / plan["flops"]["model"] - 1
        rows.append(
            (
                candidate["description"],
                format_bytes(candidate["bytes"]),
                _seconds(candidate["seconds"]),
                f"{recomputation:+.1%}",
                "" if candidate["fits"] else "does not fit",
            )
        )
    by_compiler = "compiler" in plan["times"]
    source = "the compiler's estimate" if by_compiler else f"all FLOPs at {_percent(plan['mfu'])} of the peak"
    return [*_table(rows, left={0, 4}, header=True), f"  (a step: {source})"]


def _advice(plan: dict[str, Any]) -> list[str]:
    if plan["overrides"]:
        advice = plan["overrides"]
    elif plan["best"]:
        advice = "the configuration as it is" + (
            ", the fastest of these" if plan["searched"] else "; no alternative was evaluated"
        )
    else:
        advice = 'nothing fits; set text.keep = "auto", a smaller stream.global_batch or more devices'
    lines = [f"recommended: {advice}"]
    if largest := plan.get("largest_batch"):
        by = "compiled" if largest["by"] == "compiler" else "estimated"
        lines.append(
            f"largest batch: {largest['global_batch']:,}, {format_bytes(largest['bytes'])} per device, {by}: "
            f"--stream.global_batch {largest['global_batch']} {largest['overrides']}"
        )
    return lines


def _table(rows: Sequence[tuple[str, ...]], left: set[int], header: bool = False) -> list[str]:
    """Return the lines of a table, indented; with `header` the first row is not."""
    rows = [(label if header and not n else f"  {label}", *cells) for n, (label, *cells) in enumerate(rows)]
    return format_table(rows, left).splitlines()


def _si(value: float) -> str:
    units = ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _hours(value: float) -> str:
    return f"{value:.1f} h" if value >= 1 else format_duration(3600 * value)
