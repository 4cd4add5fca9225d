"""A plan of a run: whether it fits the chips, how long it takes, what it costs and what limits it.

Where there is a compiler for the chips, the exact training step is compiled for them, and what it says is read from
its program. Where there is none, the same figures come from shapes and from the traced step, and the plan says so.
"""

from __future__ import annotations

from typing import Any

from lit_fast.config import Config
from lit_fast.data.tokens import id_dtype
from lit_fast.errors import UserError
from lit_fast.train.cost.flops import step_flops
from lit_fast.train.cost.hlo import largest_buffers
from lit_fast.train.plan.candidates import (
    Planner,
    Say,
    Way,
    described,
    fastest,
    largest_batch,
    overrides,
    search,
)
from lit_fast.train.plan.target import Target

PAPER_MFU = 0.33


def make_plan(
    config: Config, target: Target, *, mfu: float, price: float, searched: bool, largest: bool, say: Say
) -> dict[str, Any]:
    """Everything that a plan says, ready for JSON; bytes and FLOPs are of one device, seconds of one step.

    Args:
      mfu: share of the chips' peak that is assumed.
      price: of one chip for an hour; 0: not known.
      searched: look for a faster way than the config's own.
      largest: look for the largest batch.
      say: told what is going on.

    Raises:
      UserError: the configuration makes no sense on these devices, or does not fit in any way.
    """
    planner = Planner(config, target, mfu, say)
    chosen = _chosen(planner, config if largest else None)
    ways = [chosen]
    if searched and target.platform != "cpu":  # whose compiler estimates nothing
        ways = search(planner, chosen)
    best = fastest(planner, ways)
    data, chip, needs = planner.data, target.chip, planner.needs(chosen.text)
    model = planner.build(chosen.text)
    batch, steps = config.stream.global_batch, config.steps
    texts = batch * config.stream.captions_per_image
    tokens = float(data.lengths.mean()) if config.text.packed else None
    flops = step_flops(model, texts, batch, config.loss.image_head, tokens) / target.devices
    floors = _floors(planner, chosen)
    stated = {"floor": max(floors.values())}
    if chosen.cycle_seconds is not None:
        stated["compiler"] = chosen.cycle_seconds
    stated |= {"paper": flops / chip.flops / PAPER_MFU, "stated": flops / chip.flops / mfu}
    kept = needs.kept(chosen.text)
    fixed = needs.parameters + needs.optimizer + needs.batch
    if chosen.compiled:  # the compiler lets buffers share memory that are not needed at once
        kept = min(kept, chosen.compiled.temporary_bytes)
    plan: dict[str, Any] = {
        "topology": target.topology,
        "devices": target.devices,
        "chip": chip._asdict(),
        "by": "compiler" if chosen.compiled else "estimate",
        "compile_seconds": chosen.compiled.seconds if chosen.compiled else None,
        "compiler_refuses": target.mesh is not None and chosen.compiled is None,
        "data": {"description": data.description, "rows": data.rows, "tower": data.tower, "width": data.width}
        | data.vocabulary._asdict(),
        "steps": steps,
        "global_batch": batch,
        "texts": texts,
        "way": _summary(planner, chosen),
        "memory": {
            "parameters": needs.parameters,
            "optimizer": needs.optimizer,
            "batch": needs.batch,
            "kept": kept,
            "temporaries": max(0, chosen.bytes - fixed - kept),
            "total": chosen.bytes,
            "room": int(planner.room),
            "limit": int(chip.memory),
            "fits": chosen.fits,
        },
        "buffers": largest_buffers(chosen.compiled.text) if chosen.compiled else [],
        "flops": {"model": flops, "executed": chosen.flops, "recompute": chosen.flops / flops - 1},
        "collectives": {name: c._asdict() for name, c in chosen.collectives.items()},
        "floors": floors,
        "limit": max(floors, key=lambda name: floors[name]),
        "times": {name: _time(planner, s, flops, price) for name, s in stated.items()},
        "mfu": mfu,
        "price": price,
        "store": _store(planner),
        "ways": [_summary(planner, way) for way in ways],
        "searched": len(ways) > 1,
        "best": described(best.text) if best else None,
        "overrides": overrides(best.text) if best and best.text != chosen.text else "",
    }
    if largest:
        plan["largest_batch"] = largest_batch(config, target, say)
    return plan


def _chosen(planner: Planner, config: Config | None) -> Way:
    """The config's own way; where it does not fit, the error says the largest batch of `config` that does."""
    try:
        return planner.chosen()
    except UserError as error:
        if config is None:
            raise
        fits = largest_batch(config, planner.target, planner.say)
        raise UserError(
            f"{error}; the largest that fits: --stream.global_batch {fits['global_batch']} {fits['overrides']}"
        ) from None


def _floors(planner: Planner, way: Way) -> dict[str, float]:
    """Seconds below which a step cannot be in this way, by what limits it.

    What must move: parameters and optimizer state are read and written, gradients and what is kept written and
    read, the batch read. Of n devices in a ring each sends 2 (n - 1) / n of what is summed, and what it gathers n - 1
    times.
    """
    needs, chip, n = planner.needs(way.text), planner.target.chip, planner.target.devices
    moved = 2 * (needs.parameters + needs.optimizer + needs.gradients + needs.kept(way.text)) + needs.batch
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
    sent = sum(share.get(name, (n - 1) / n) * c.bytes for name, c in way.collectives.items())
    return {
        "compute": way.flops / chip.flops,
        "memory bandwidth": moved / chip.bandwidth,
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
    """Of the dataset's rows, or of a million where their number is not known."""
    data, target = planner.data, planner.target
    rows = data.rows or 1_000_000
    peak = target.chip.flops * target.devices * planner.mfu
    ids = data.vocabulary.max_length * id_dtype(data.vocabulary.vocab_size).itemsize
    return {
        "rows": rows,
        "known": bool(data.rows),
        "bytes": rows * data.views * data.width * 2,
        "row_bytes": data.width * 2 + planner.config.stream.captions_per_image * ids,
        "embedding_seconds": rows * data.image_flops / peak if data.image_flops else None,
        "passes": planner.config.steps * planner.config.stream.global_batch / data.rows
        if data.rows
        else None,
    }


def _summary(planner: Planner, way: Way) -> dict[str, Any]:
    return {
        "description": described(way.text),
        "keep": way.text.keep,
        "parts": way.text.microbatches,
        "pack": way.text.pack,
        "bytes": way.bytes,
        "fits": way.fits,
        "seconds": planner.seconds(way),
        "executed_flops": way.flops,
        "by": "compiler" if way.compiled else "estimate",
    }
