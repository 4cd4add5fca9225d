"""Plan a run: its memory, time and price, and the limiting resource.

Where there is a compiler for the target, the exact training step is compiled and the figures come from the program.
Otherwise they come from shapes and the traced step, and the plan says so.
"""

from __future__ import annotations

from typing import Any

from lit_fast.config import Config
from lit_fast.data.tokens import id_dtype
from lit_fast.errors import UserError
from lit_fast.train.cost.flops import step_flops
from lit_fast.train.cost.hlo import largest_buffers
from lit_fast.train.plan.candidates import (
    Candidate,
    Planner,
    describe,
    fastest,
    largest_batch,
    overrides,
    search,
)
from lit_fast.train.plan.target import Target

PAPER_MFU = 0.33


def make_plan(
    config: Config, target: Target, *, mfu: float, price: float, searched: bool, largest: bool
) -> dict[str, Any]:
    """Return the plan as JSON values; bytes and FLOPs per device, seconds per step.

    Args:
      mfu: assumed share of the chips' peak.
      price: of one chip per hour; 0: unknown.
      searched: look for faster candidates than the configuration itself.
      largest: look for the largest batch.

    Raises:
      UserError: the configuration is invalid for these devices, or no candidate fits.
    """
    planner = Planner(config, target, mfu)
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
    data, chip, memory = planner.data, target.chip, planner.memory(default.text)
    model = planner.build(default.text)
    batch, steps = config.stream.global_batch, config.steps
    texts = batch * config.stream.captions_per_image
    tokens = float(data.lengths.mean()) if config.text.packed else None
    flops = step_flops(model, texts, batch, config.loss.image_head, tokens) / target.devices
    bounds = lower_bounds(planner, default)
    seconds = {"floor": max(bounds.values())}
    if default.compiler_seconds is not None:
        seconds["compiler"] = default.compiler_seconds
    seconds |= {"paper": flops / chip.flops / PAPER_MFU, "stated": flops / chip.flops / mfu}
    residuals = memory.residuals(default.text)
    fixed = memory.parameters + memory.optimizer + memory.batch
    if default.compiled:  # the compiler shares memory between buffers
        residuals = min(residuals, default.compiled.temporary_bytes)
    plan: dict[str, Any] = {
        "topology": target.topology,
        "devices": target.devices,
        "chip": chip._asdict(),
        "by": "compiler" if default.compiled else "estimate",
        "compile_seconds": default.compiled.seconds if default.compiled else None,
        "compiler_refuses": target.mesh is not None and default.compiled is None,
        "data": {"description": data.description, "rows": data.rows, "tower": data.tower, "width": data.width}
        | data.vocabulary._asdict(),
        "steps": steps,
        "global_batch": batch,
        "texts": texts,
        "way": _summary(planner, default),
        "memory": {
            "parameters": memory.parameters,
            "optimizer": memory.optimizer,
            "batch": memory.batch,
            "kept": residuals,
            "temporaries": max(0, default.bytes - fixed - residuals),
            "total": default.bytes,
            "room": int(planner.usable_memory),
            "limit": int(chip.memory),
            "fits": default.fits,
        },
        "buffers": largest_buffers(default.compiled.text) if default.compiled else [],
        "flops": {"model": flops, "executed": default.flops, "recompute": default.flops / flops - 1},
        "collectives": {name: c._asdict() for name, c in default.collectives.items()},
        "floors": bounds,
        "limit": max(bounds, key=lambda name: bounds[name]),
        "times": {name: _time(planner, s, flops, price) for name, s in seconds.items()},
        "mfu": mfu,
        "price": price,
        "store": _store(planner),
        "ways": [_summary(planner, candidate) for candidate in candidates],
        "searched": len(candidates) > 1,
        "best": describe(best.text) if best else None,
        "overrides": overrides(best.text) if best and best.text != default.text else "",
    }
    if largest:
        plan["largest_batch"] = largest_batch(config, target)
    return plan


def lower_bounds(planner: Planner, candidate: Candidate) -> dict[str, float]:
    """Return lower bounds of the seconds of a step, by limiting resource.

    Memory traffic: parameters, optimizer state, gradients and residuals are written and read, the batch is read. In a
    ring of n devices, each sends 2 (n - 1) / n of the bytes that are reduced, and n - 1 times those that are gathered.
    """
    memory, chip, n = planner.memory(candidate.text), planner.target.chip, planner.target.devices
    state = memory.parameters + memory.optimizer + memory.gradients
    traffic = 2 * (state + memory.residuals(candidate.text)) + memory.batch
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
    sent = sum(share.get(name, (n - 1) / n) * c.bytes for name, c in candidate.collectives.items())
    return {
        "compute": candidate.flops / chip.flops,
        "memory bandwidth": traffic / chip.bandwidth,
        "interconnect": sent / chip.interconnect,
    }


def _time(planner: Planner, seconds: float, flops: float, price: float) -> dict[str, float | None]:
    config, target = planner.config, planner.target
    hours = config.steps * seconds / 3600
    return {
        "seconds": seconds,
        "mfu": flops / seconds / target.chip.flops,
        "hours": hours,
        "price": hours * target.devices * price if price else None,
        "rows_per_second": config.stream.global_batch / seconds,
    }


def _store(planner: Planner) -> dict[str, Any]:
    """Return the cost of the features, for a million rows where the number is unknown."""
    data, target, config = planner.data, planner.target, planner.config
    rows = data.rows or 1_000_000
    peak = target.chip.flops * target.devices * planner.mfu
    id_bytes = data.vocabulary.max_length * id_dtype(data.vocabulary.vocab_size).itemsize
    return {
        "rows": rows,
        "known": bool(data.rows),
        "bytes": rows * data.views * data.width * 2,
        "row_bytes": data.width * 2 + config.stream.captions_per_image * id_bytes,
        "embedding_seconds": rows * data.image_flops / peak if data.image_flops else None,
        "passes": config.steps * config.stream.global_batch / data.rows if data.rows else None,
    }


def _summary(planner: Planner, candidate: Candidate) -> dict[str, Any]:
    return {
        "description": describe(candidate.text),
        "keep": candidate.text.keep,
        "parts": candidate.text.microbatches,
        "pack": candidate.text.pack,
        "bytes": candidate.bytes,
        "fits": candidate.fits,
        "seconds": planner.seconds(candidate),
        "executed_flops": candidate.flops,
        "by": "compiler" if candidate.compiled else "estimate",
    }
