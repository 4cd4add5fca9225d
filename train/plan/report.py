"""A plan as one page of text."""

from __future__ import annotations

from typing import Any

from lit_fast.utils.format import format_duration

_GIB = 2**30
_LIMITS = {
    "compute": "the chips' arithmetic",
    "memory bandwidth": "the memory's bandwidth",
    "interconnect": "the links between the chips",
}


def format_plan(plan: dict[str, Any]) -> str:
    """What `lit_fast.train.plan.plan.make_plan` found, for people to act on."""
    parts = [_head(plan), _verdict(plan), _memory(plan), _work(plan), _times(plan), _data(plan)]
    if plan["searched"]:
        parts.append(_ways(plan))
    parts.append(_advice(plan))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _head(plan: dict[str, Any]) -> list[str]:
    data, chip = plan["data"], plan["chip"]
    by = (
        f"by the compiler, in {format_duration(plan['compile_seconds'])}"
        if plan["by"] == "compiler"
        else "an analytic ESTIMATE: "
        + (
            "the compiler refuses the step"
            if plan["compiler_refuses"]
            else "no such device is here to compile for"
        )
    )
    measured = "measured here" if chip["name"] == "cpu" else "data sheet"
    return [
        f"{plan['topology']}: {plan['devices']} x {chip['kind']}, {_si(chip['flops'])}FLOP/s each ({measured}); {by}",
        f"{plan['steps']:,} steps of {plan['global_batch']:,} images, {plan['texts']:,} texts; keeps "
        f"{plan['way']['description']}",
        f"{data['description']}, {data['width']} wide; {data['vocab_size']:,} pieces, {data['max_length']} tokens",
    ]


def _verdict(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    spare = memory["room"] - memory["total"]
    if memory["fits"]:
        found = (
            f"FITS: {_size(memory['total'])} of {_size(memory['limit'])} a device; "
            f"{_size(spare)} to spare of the {_size(memory['room'])} that a run may take"
        )
    elif plan["compiler_refuses"]:
        found = f"DOES NOT FIT: the compiler refuses; a device has {_size(memory['limit'])}"
    else:
        found = (
            f"DOES NOT FIT: {_size(memory['total'])} a device, {_size(-spare)} more than the "
            f"{_size(memory['room'])} that a run may take of {_size(memory['limit'])}"
        )
    if plan["topology"].startswith("gpu:") and plan["by"] == "estimate":
        return [
            found,
            "(three quarters of the GPU's memory: JAX takes more only with XLA_PYTHON_CLIENT_MEM_FRACTION)",
        ]
    return [found]


def _memory(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    names = {
        "parameters": "parameters",
        "optimizer": "optimizer state",
        "batch": "batch",
        "kept": "kept for the backward pass",
        "temporaries": "other temporaries",
    }
    lines = ["memory of a device"]
    lines += [f"  {label:28}{_size(memory[name]):>10}" for name, label in names.items()]
    if plan["buffers"]:
        buffer = plan["buffers"][0]
        lines.append(f"  {'largest buffer':28}{_size(buffer['bytes']):>10}  {buffer['shape']}")
    return lines


def _work(plan: dict[str, Any]) -> list[str]:
    flops = plan["flops"]
    lines = [
        "a step on one device",
        f"  {'model FLOPs':28}{_si(flops['model']):>10}  recompute {flops['recompute']:+.1%}",
    ]
    for name, found in plan["collectives"].items():
        lines.append(f"  {name:28}{_si(found['bytes']) + 'B':>10}  in {found['calls']:,}")
    for name, seconds in plan["floors"].items():
        if not seconds:  # one device sends nothing
            continue
        mark = "  <- what limits it" if name == plan["limit"] else ""
        lines.append(f"  {'floor by ' + name:28}{_seconds(seconds):>10}{mark}")
    return lines


def _times(plan: dict[str, Any]) -> list[str]:
    names = {
        "floor": f"floor, by {_LIMITS[plan['limit']]}",
        "compiler": "compiler's estimate (no measurement)",
        "paper": "at 33 % MFU, the paper's",
        "stated": f"at {_percent(plan['mfu'])} MFU, assumed",
    }
    price = bool(plan["price"])
    lines = [
        f"{'time':38}{'a step':>10}{'MFU':>8}{'whole run':>12}"
        + (f"{'USD':>10}" if price else "")
        + f"{'images/s to stream':>20}"
    ]
    for name, found in plan["times"].items():
        under = "  below the floor" if found["seconds"] < plan["times"]["floor"]["seconds"] else ""
        cost = f"{found['price']:>10,.{0 if found['price'] >= 100 else 2}f}" if price else ""
        lines.append(
            f"  {names[name]:36}{_seconds(found['seconds']):>10}{found['mfu']:>8.0%}{_hours(found['hours']):>12}"
            f"{cost}{found['rows_per_second']:>20,.0f}{under}"
        )
    return lines


def _data(plan: dict[str, Any]) -> list[str]:
    store, data = plan["store"], plan["data"]
    rows = f"{store['rows']:,} rows" if store["known"] else "a million rows (--plan.rows N says how many)"
    share, stated = _percent(plan["mfu"]), plan["times"]["stated"]["rows_per_second"]
    passes = f"; the run sees each {store['passes']:,.1f} times" if store["passes"] else ""
    lines = [
        f"features of {rows}: {_si(store['bytes'])}B{passes}",
        f"a streamed row is {store['row_bytes']:,} bytes: {_si(stated * store['row_bytes'])}B/s at {share} MFU",
    ]
    if store["embedding_seconds"] is not None:
        lines.append(
            f"embedding them with {data['tower']}: {format_duration(store['embedding_seconds'])} at {share} of the "
            "peak (arithmetic; decoding the images may be slower)"
        )
    return lines


def _ways(plan: dict[str, Any]) -> list[str]:
    lines = [f"{'ways to use the memory':42}{'memory':>12}{'a step':>10}{'recompute':>12}"]
    for way in plan["ways"]:
        state = "" if way["fits"] else "  does not fit"
        again = way["executed_flops"] / plan["flops"]["model"] - 1
        lines.append(
            f"  {way['description']:40}{_size(way['bytes']):>12}{_seconds(way['seconds']):>10}{again:>+12.1%}{state}"
        )
    by = (
        "the compiler's estimate"
        if "compiler" in plan["times"]
        else f"all it executes at {_percent(plan['mfu'])} of the peak"
    )
    return [*lines, f"  (a step: {by})"]


def _advice(plan: dict[str, Any]) -> list[str]:
    lines = []
    if plan["overrides"]:
        lines.append(f"recommended: {plan['overrides']}")
    elif plan["best"]:
        lines.append(
            "recommended: the config as it is"
            + (", the best of these" if plan["searched"] else "; no other way was tried")
        )
    else:
        lines.append(
            'recommended: text.keep = "auto", a smaller stream.global_batch or more devices; none of these ways fits'
        )
    if largest := plan.get("largest_batch"):
        by = "compiled" if largest["by"] == "compiler" else "estimated"
        lines.append(
            f"largest batch: {largest['global_batch']:,}, {_size(largest['bytes'])} a device, {by}: "
            f"--stream.global_batch {largest['global_batch']} {largest['overrides']}"
        )
    return lines


def _size(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:,.1f} MiB"


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
