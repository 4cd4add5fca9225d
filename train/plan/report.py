"""A plan as one page of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_fast.train.cost.hlo import ASYNC_COPY, COLLECTIVES
from lit_fast.train.plan.image import PHOTOS_PER_CORE
from lit_fast.utils.format import format_bytes, format_duration, format_table

_RESOURCES = {
    "compute": "the chips' arithmetic",
    "memory bandwidth": "the memory's bandwidth",
    "interconnect": "the links between the chips",
}
_SMALL_BYTES = 1e7  # instructions without an estimate are not listed below


def format_plan(plan: dict[str, Any]) -> str:
    """Return the page of a plan of `lit_fast.train.plan.plan.make_plan`."""
    parts = [_head(plan), _verdict(plan), _memory(plan), _step(plan), format_times(plan), _planning(plan)]
    parts += [_data(plan), _prices(plan), _candidates(plan) if plan["searched"] else [], _advice(plan)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _head(plan: dict[str, Any]) -> list[str]:
    data, chip = plan["data"], plan["chip"]
    if plan["by"] == "compiler":
        source = f"by the compiler, in {format_duration(plan['compile_seconds'])}"
    elif plan["compiler_refuses"]:
        source = "an analytic ESTIMATE: the compiler refuses the step"
    else:
        source = f"an analytic ESTIMATE: {plan['no_compiler']}"
    measured = "measured here" if chip["name"] == "cpu" else "data sheet"
    devices = f"{plan['devices']} x {chip['title']}, {count(plan['hosts'], 'host')}"
    vocabulary = f"vocabulary of {data['vocab_size']:,}, {data['max_length']} tokens"
    name = plan["name"] if plan["name"] == plan["topology"] else f"{plan['name']} ({plan['topology']})"
    return [
        f"{name}: {devices}, {_si(chip['flops'])}FLOP/s each ({measured})",
        source,
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
    if plan["platform"] == "gpu":
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
    if (program := plan["program"]) and plan["platform"] == "gpu":
        start = program["kernel_seconds"]
        spent = format_seconds(program["kernels"] * start)
        rows.append(
            ("kernels", f"{program['kernels']:,.0f}", f"{spent} if each takes {1e6 * start:.0f} us to start")
        )
    for name, seconds in plan["floors"].items():
        if seconds:  # one device has no interconnect
            limits = plan["limited"] and name == plan["limit"]
            rows.append(
                (f"lower bound by {name}", format_seconds(seconds), "<- limits the step" if limits else "")
            )
    return ["a step on one device", *_table(rows, left={0, 2})]


def format_times(plan: dict[str, Any]) -> list[str]:
    """Return the table of times: lower bound, compiler's estimate, assumed MFUs; the one to plan by is marked."""
    on_v4 = "the paper's" if plan["chip"]["name"] == "v4" else "the paper's on TPU v4"
    labels = {
        "floor": f"lower bound, by {_RESOURCES[plan['limit']]}",
        "compiler": "compiler's estimate (no measurement)",
        "paper": "products, and 2 us a kernel" if plan["kernels_limit"] else f"at 33 % MFU, {on_v4}",
        "stated": f"at {_percent(plan['mfu'] or 0)} MFU, as stated",
    }
    rows = [("time", "a step", "MFU", "whole run", *["USD"] * bool(plan["price"]), "images/s to stream", "")]
    for name, time in plan["times"].items():
        usd = time["hours"] * plan["devices"] * plan["price"]
        mark = "<- plan by this" if name == plan["planning"]["by"] else ""
        if time["seconds"] < plan["times"]["floor"]["seconds"]:
            mark = "below the lower bound"
        rows.append(
            (
                labels[name],
                format_seconds(time["seconds"]),
                f"{time['mfu']:.0%}",
                format_hours(time["hours"]),
                *[format_usd(usd)] * bool(plan["price"]),
                f"{time['rows_per_second']:,.0f}",
                mark,
            )
        )
    return _table(rows, left={0, len(rows[0]) - 1}, header=True)


def _planning(plan: dict[str, Any]) -> list[str]:
    """Return how far the time to plan by can be trusted."""
    planning, program = plan["planning"], plan["program"]
    low, high = planning["low_seconds"], planning["high_seconds"]
    hours = [format_hours(plan["steps"] * seconds / 3600) for seconds in (low, high)]
    lines = []
    if low < high:
        lines.append(
            f"range: {format_seconds(low)} to {format_seconds(high)} a step, {hours[0]} to {hours[1]}"
        )
    if planning["by"] == "compiler":
        lines[0] += ", which allows for"
        overstated = format_seconds(program["overstated_seconds"])
        lines.append(
            f"  work on 16-bit numbers outside of products, which the compiler overstates: up to {overstated} less"
        )
        if missing := _unestimated(program):
            lines.append(f"  no estimate, counted as nothing: {missing}")
        if program["custom_kernels"]:
            kernels = ", ".join(f"{name} x {runs:,.0f}" for name, runs in program["custom_kernels"].items())
            lines.append(f"  counted from the schedules of their compiled code: {kernels}")
    elif planning["by"] == "paper" and lines:
        lines[0] += ": at 50 % and 25 % MFU"
    store = plan["store"]
    extra = [f"{count(store['checkpoint_saves'], 'checkpoint')}, written in the background"]
    if store["evaluations"]:
        extra.append(f"about {count(store['evaluations'], 'evaluation')}")
    lines.append(f"not in the time: start and compilation, {', '.join(extra)}")
    return lines


def _unestimated(program: dict[str, Any]) -> str:
    """Return the instructions without an estimate that add to the time, those that move most first."""
    items = sorted(program["unestimated"].items(), key=lambda item: -item[1]["bytes"])
    return ", ".join(
        f"{name} x {u['calls']:,.0f}"
        for name, u in items
        if name != ASYNC_COPY
        and (u["bytes"] >= _SMALL_BYTES or name in COLLECTIVES or name.startswith("custom-call"))
    )


def _data(plan: dict[str, Any]) -> list[str]:
    store, data = plan["store"], plan["data"]
    rows = f"{store['rows']:,} rows" if store["known"] else "a million rows (--plan.rows N sets the number)"
    passes = f"; {store['passes']:,.1f} epochs" if store["passes"] else ""
    rate, hosts = store["rows_per_second"], plan["hosts"]
    stream = f"to stream: {rate:,.0f} images/s of {store['row_bytes']:,} bytes, {_si(store['bytes_per_second'])}B/s"
    if hosts > 1:
        stream += f"; a host {rate / hosts:,.0f} images/s, {_si(store['bytes_per_second'] / hosts)}B/s"
    if store["cores_per_host"] is not None:
        cores = f"{store['cores_per_host']:.1f} cores"
        lines = [
            f"images of {rows}, decoded while training{passes}",
            f"to decode: {rate:,.0f} images/s; a host {rate / hosts:,.0f} images/s, about {cores} at "
            f"{PHOTOS_PER_CORE} photos of 500 x 375 pixels a second and core",
        ]
    else:
        lines = [f"features of {rows}: {_si(store['bytes'])}B{passes}"]
    lines += [
        stream,
        f"checkpoints: {store['checkpoints_kept']} kept, {_si(store['checkpoint_bytes'])}B each",
    ]
    if store["embedding_seconds"] is not None:
        share = _percent(plan["planning"]["mfu"])
        lines.append(
            f"embedding with {data['tower']}: {format_duration(store['embedding_seconds'])} at {share} of the peak, as "
            "the step (arithmetic only; decoding the images may take longer)"
        )
    return lines


def _prices(plan: dict[str, Any]) -> list[str]:
    usd, store = plan["usd"], plan["store"]
    if usd is None:
        return []
    rows = [("training", format_usd(usd["training"]), "")]
    if store["embedding_seconds"] is not None:
        rows.append(("embedding", format_usd(usd["embedding"]), "" if store["known"] else "a million rows"))
    rows.append(
        (
            "storage, a month",
            format_usd(usd["storage_per_month"]),
            f"features, tokens, checkpoints; assumed {plan['storage_price']:g} USD a GB (--storage-price)",
        )
    )
    head = f"price in USD, at {plan['price']:g} a chip and hour"
    return [head, *_table(rows, left={0, 2})]


def _candidates(plan: dict[str, Any]) -> list[str]:
    kernels = any(candidate["kernels"] for candidate in plan["ways"])
    rows = [
        (
            "candidates (text.keep, text.microbatches, text.pack)",
            *("memory", "a step", "recomputation"),
            *["kernels"] * kernels,
            "",
        )
    ]
    for candidate in plan["ways"]:
        recomputation = candidate["executed_flops"] / plan["flops"]["model"] - 1
        rows.append(
            (
                candidate["description"],
                format_bytes(candidate["bytes"]),
                format_seconds(candidate["seconds"]),
                f"{recomputation:+.1%}",
                *[f"{candidate['kernels'] or 0:,.0f}"] * kernels,
                "" if candidate["fits"] else "does not fit",
            )
        )
    if "compiler" in plan["times"]:
        source = "the compiler's estimate"
    else:
        source = "the time to plan by, in proportion to products" + " and kernels" * kernels
    return [*_table(rows, left={0, len(rows[0]) - 1}, header=True), f"  (a step: {source})"]


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


def count(number: int, noun: str) -> str:
    """Return `1 host` or `2 hosts`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _si(value: float) -> str:
    units = ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def format_seconds(value: float) -> str:
    """Return `1.17 s` or `453 ms`."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def format_hours(value: float) -> str:
    """Return `21.2 h`, and less than an hour as `52m06s`."""
    return f"{value:.1f} h" if value >= 1 else format_duration(3600 * value)


def format_usd(value: float) -> str:
    """Return `273`, and less than 100 with cents."""
    return f"{value:,.{0 if value >= 100 else 2}f}"
