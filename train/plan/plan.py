"""Plan a run: its memory, time and price, and the limiting resource.

Where there is a compiler for the target, the exact training step is compiled and the figures come from the program.
Otherwise they come from shapes and the traced step, and the plan says so.
"""

from __future__ import annotations

from typing import Any

from lit_fast.config import Config
from lit_fast.errors import UserError
from lit_fast.train.cost.flops import step_flops
from lit_fast.train.cost.hlo import largest_buffers
from lit_fast.train.plan.candidates import KERNEL_SECONDS, Candidate, Planner, describe, overrides
from lit_fast.train.plan.costs import STORAGE_PRICE, data_costs, usd
from lit_fast.train.plan.search import fastest, largest_batch, search
from lit_fast.train.plan.target import Target
from lit_fast.train.plan.times import step_times


def make_plan(
    config: Config,
    target: Target,
    *,
    mfu: float | None = None,
    price: float = 0.0,
    storage_price: float = STORAGE_PRICE,
    searched: bool = True,
    largest: bool = False,
) -> dict[str, Any]:
    """Return the plan as JSON values; bytes and FLOPs per device, seconds per step.

    Args:
      mfu: share of the chips' peak to plan by; None: the compiler's estimate, or the paper's share.
      price: of one chip per hour; 0: unknown.
      storage_price: of one GB per month.
      searched: look for faster candidates than the configuration itself.
      largest: look for the largest batch.

    Raises:
      UserError: the configuration is invalid for these devices, or no candidate fits.
    """
    planner = Planner(config, target)
    try:
        default = planner.default()
    except UserError as error:
        if not largest:
            raise
        fits = largest_batch(config, target)
        raise UserError(
            f"{error}; the largest that fits: --stream.global_batch {fits['global_batch']} {fits['overrides']}"
        ) from None
    candidates = [default]
    if searched and target.platform != "cpu":  # the CPU compiler estimates no time
        candidates = search(planner, default)
    best = fastest(planner, candidates)
    data, chip = planner.data, target.chip
    model = planner.build(default.text)
    batch, steps = config.stream.global_batch, config.steps
    texts = batch * config.stream.captions_per_image
    tokens = float(data.lengths.mean()) if config.text.packed else None
    flops = step_flops(model, texts, batch, config.loss.image_head, tokens, planner.image) / target.devices
    times = step_times(planner, default, flops, mfu)
    seconds = times["planning"]["seconds"]
    store = data_costs(planner, default, seconds, times["planning"]["mfu"])
    scale = seconds / planner.relative_seconds(default)
    plan: dict[str, Any] = {
        "topology": target.topology,
        "name": target.name,
        "devices": target.devices,
        "hosts": target.hosts,
        "platform": target.platform,
        "chip": chip._asdict() | {"title": chip.title},
        "no_compiler": target.no_compiler,
        "by": "compiler" if default.compiled else "estimate",
        "compile_seconds": default.compiled.seconds if default.compiled else None,
        "compiler_refuses": target.mesh is not None and default.compiled is None,
        "data": {"description": data.description, "rows": data.rows, "tower": data.tower, "width": data.width}
        | data.vocabulary._asdict(),
        "steps": steps,
        "global_batch": batch,
        "texts": texts,
        "way": _summary(planner, default, scale),
        "memory": _memory(planner, default),
        "buffers": largest_buffers(default.compiled.text) if default.compiled else [],
        "flops": {"model": flops, "executed": default.flops, "recompute": default.flops / flops - 1},
        "collectives": {name: c._asdict() for name, c in default.collectives.items()},
        **times,
        "program": _program(default, chip.clock),
        "mfu": mfu,
        "price": price,
        "storage_price": storage_price,
        "usd": usd(planner, store, seconds, price, storage_price) if price else None,
        "store": store,
        "ways": [_summary(planner, candidate, scale) for candidate in candidates],
        "searched": len(candidates) > 1,
        "best": describe(best.text, best.image) if best else None,
        "overrides": overrides(best.text, best.image) if best and best.text != default.text else "",
    }
    if largest:
        plan["largest_batch"] = largest_batch(config, target)
    return plan


def _memory(planner: Planner, candidate: Candidate) -> dict[str, Any]:
    """Return the bytes of a candidate on each device, by their use."""
    memory = planner.memory(candidate.text)
    residuals = memory.residuals(candidate.text) + memory.image_residuals(candidate.image)
    if candidate.compiled:  # the compiler shares memory between buffers
        residuals = min(residuals, candidate.compiled.temporary_bytes)
    fixed = memory.parameters + memory.optimizer + memory.batch
    return {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "kept": residuals,
        "temporaries": max(0, candidate.bytes - fixed - residuals),
        "total": candidate.bytes,
        "room": int(planner.usable_memory),
        "limit": int(planner.target.chip.memory),
        "fits": candidate.fits,
    }


def _program(candidate: Candidate, clock: float) -> dict[str, Any] | None:
    """Return what the compiled program says of its instructions; None: it was not compiled."""
    program = candidate.program
    if program is None:
        return None
    return {
        "kernels": program.kernels,
        "kernel_seconds": KERNEL_SECONDS,
        "custom_kernels": program.custom,
        "unestimated": {name: u._asdict() for name, u in program.unestimated.items()} if clock else {},
        "overstated_seconds": program.half_cycles / 2 / clock if clock else 0.0,
    }


def _summary(planner: Planner, candidate: Candidate, scale: float) -> dict[str, Any]:
    """Describe a candidate; its seconds are the relative ones times `scale`."""
    return {
        "description": describe(candidate.text, candidate.image),
        "keep": candidate.text.keep,
        "parts": candidate.text.microbatches,
        **(
            {"image_keep": candidate.image.keep, "image_parts": candidate.image.microbatches}
            if planner.image
            else {}
        ),
        "pack": candidate.text.pack,
        "bytes": candidate.bytes,
        "fits": candidate.fits,
        "seconds": planner.relative_seconds(candidate) * scale,
        "kernels": candidate.kernels if planner.target.platform == "gpu" else None,
        "executed_flops": candidate.flops,
        "by": "compiler" if candidate.compiled else "estimate",
    }
