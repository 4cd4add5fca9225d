"""Several slices side by side: one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_fast.config import Config
from lit_fast.errors import UserError
from lit_fast.train.plan.costs import Prices
from lit_fast.train.plan.plan import make_plan
from lit_fast.train.plan.report import count, format_hours, format_seconds, format_usd
from lit_fast.train.plan.target import Target, open_target
from lit_fast.utils.format import format_duration, format_table
from lit_fast.utils.output import status

Plan = dict[str, Any]


def compare_slices(
    config: Config,
    topologies: Sequence[str],
    prices: Prices,
    open_slice: Callable[[str], Target] = open_target,
    **options: Any,
) -> dict[str, Any]:
    """Plan a configuration, as it is, for several slices.

    Args:
      options: of `make_plan`.

    Returns:
      `slices`: a plan each, or its `topology` and `error`; `fastest` and `cheapest`: names, None where unknown.

    Raises:
      UserError: no slice can be planned.
    """
    slices: list[Plan] = []
    for number, topology in enumerate(topologies, 1):
        status(f"slice {number} of {len(topologies)}: {topology}")
        try:
            target = open_slice(topology)
            price = prices.of(target)
            slices.append(make_plan(config, target, price=price, searched=False, largest=False, **options))
        except UserError as error:
            slices.append({"topology": topology, "error": str(error)})
    plans = [plan for plan in slices if "error" not in plan]
    if not plans:
        raise UserError(slices[0]["error"])
    fitting = [plan for plan in plans if plan["memory"]["fits"]]
    priced = [plan for plan in fitting if plan["usd"]]
    return {
        "slices": slices,
        "fastest": min(fitting, key=_run_seconds)["name"] if fitting else None,
        "cheapest": min(priced, key=lambda plan: plan["usd"]["training"])["name"] if priced else None,
    }


def format_comparison(found: dict[str, Any]) -> str:
    """Return the table of `compare_slices` and the recommendation."""
    slices = found["slices"]
    plans = [plan for plan in slices if "error" not in plan]
    priced = any(plan["usd"] for plan in plans)
    head = (
        "slice",
        "chips",
        "hosts",
        "GiB per device",
        "fits",
        "text.keep",
        "a step",
        "range",
        "run",
        "range",
    )
    prices = ("USD", "USD to embed") if priced else ()
    rows = [(*head, *prices, "images/s a host", "time by")]
    rows += [_row(plan, priced) for plan in plans]
    first = plans[0]
    parts = [
        [
            f"{first['steps']:,} steps of {first['global_batch']:,} images, {first['texts']:,} texts",
            f"{first['data']['description']}, {first['data']['width']} wide",
        ],
        format_table(rows, left={0, 1, 4, 5, len(rows[0]) - 1}).splitlines(),
        [f"not planned: {plan['error']}" for plan in slices if "error" in plan],
        _notes(plans),
        _recommendation(found, plans),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _row(plan: Plan, priced: bool) -> tuple[str, ...]:
    memory, planning, steps = plan["memory"], plan["planning"], plan["steps"]
    low, high = planning["low_seconds"], planning["high_seconds"]
    usd = (
        [format_usd(plan["usd"][k]) if plan["usd"] else "?" for k in ("training", "embedding")]
        if priced
        else []
    )
    return (
        plan["name"],
        f"{plan['devices']} x {plan['chip']['title']}",
        f"{plan['hosts']}",
        f"{memory['total'] / 2**30:.1f} of {memory['room'] / 2**30:.1f}",
        "yes" if memory["fits"] else "NO",
        plan["way"]["description"].partition(" microbatch")[0],
        format_seconds(planning["seconds"]),
        f"{format_seconds(low)} - {format_seconds(high)}",
        format_hours(_run_seconds(plan) / 3600),
        f"{steps * low / 3600:.1f} - {steps * high / 3600:.1f}",
        *usd,
        f"{plan['store']['rows_per_second'] / plan['hosts']:,.0f}",
        _source(plan),
    )


def _source(plan: Plan) -> str:
    """Return where the time to plan by comes from."""
    if plan["planning"]["by"] == "paper":
        return "kernels" if plan["kernels_limit"] else "33 % MFU"
    return "compiler" if plan["planning"]["by"] == "compiler" else "stated MFU"


def _notes(plans: list[Plan]) -> list[str]:
    used = {_source(plan) for plan in plans}
    notes = []
    if "compiler" in used:
        notes.append(
            "compiler: its estimate of the compiled step, never measured; the range allows for what it leaves out"
        )
    if "33 % MFU" in used:
        notes.append("33 % MFU: the paper's share of the peak, on TPU v4; the range is 25 to 50 %")
    if "kernels" in used:
        notes.append("kernels: products at the full rate, and 2 us to start each kernel")
    if missing := sorted({plan["no_compiler"] for plan in plans if plan["no_compiler"]}):
        names = ", ".join(plan["name"] for plan in plans if plan["no_compiler"])
        notes += [f"memory of {names} is an ESTIMATE: {reason}" for reason in missing]
    notes.append("not in the time: start and compilation, checkpoints, evaluations")
    if compiled := [p for p in plans if p["compile_seconds"]]:
        times = ", ".join(f"{p['name']} {format_duration(p['compile_seconds'])}" for p in compiled)
        notes.append(f"compiled on this machine in: {times}")
    if priced := [p for p in plans if p["usd"]]:
        low, high = (f(p["usd"]["storage_per_month"] for p in priced) for f in (min, max))
        notes.append(f"USD to embed: {priced[0]['data']['rows'] or 1_000_000:,} images, by arithmetic")
        notes.append(
            "not in the USD: storage of features, tokens and checkpoints, "
            + format_usd(low)
            + f" to {format_usd(high)}" * (format_usd(low) != format_usd(high))
            + f" a month at {priced[0]['storage_price']:g} USD a GB"
        )
    return notes


def _recommendation(found: dict[str, Any], plans: list[Plan]) -> list[str]:
    by_name = {plan["name"]: plan for plan in plans}
    if found["fastest"] is None:
        return ["recommended: nothing fits; choose a smaller stream.global_batch or more devices"]
    fastest = by_name[found["fastest"]]
    lines = [f"fastest: {fastest['name']}, {format_hours(_run_seconds(fastest) / 3600)}"]
    if found["cheapest"]:
        plan = by_name[found["cheapest"]]
        lines.append(
            f"cheapest: {plan['name']}, {format_usd(plan['usd']['training'])} USD for the training in "
            f"{format_hours(_run_seconds(plan) / 3600)} on {count(plan['devices'], 'chip')}"
            + ("" if all(p["usd"] for p in plans) else ", of those with a price")
        )
    lines.append(
        "details of one, and a search for a faster way to use it: lit-fast plan CONFIG --topology NAME"
    )
    return lines


def _run_seconds(plan: Plan) -> float:
    return float(plan["steps"] * plan["planning"]["seconds"])
