"""The largest batch that devices have room for."""

from __future__ import annotations

import dataclasses
from typing import Any

from lit_fast.config import Config, TextConfig
from lit_fast.errors import UserError
from train.memory import candidates
from train.target import Target
from train.ways import Planner, Say, Way, described, overrides

_FIRST = 2048  # rows of captions of a device, which are several parts already
_BOUND = 2**30


def largest_batch(config: Config, target: Target, say: Say) -> dict[str, Any]:
    """The largest that fits when a part keeps its embeddings alone: a power of two, devices and captions of a row.

    What a step needs is nearly linear in its batch, so two estimates say where to begin; where there is a compiler,
    it has the last word.

    Raises:
      UserError: not even a small batch fits.
    """
    unit = target.devices * config.text.pack
    smallest = unit * _FIRST
    low, high = (_planner(config, target, batch, say) for batch in (smallest, 2 * smallest))
    base = _estimate(low)
    slope = _estimate(high) - base
    batch = smallest
    while 2 * batch < _BOUND and base + (2 * batch / smallest - 1) * slope <= low.room:
        batch *= 2
    tried: dict[int, Way] = {}

    def at(batch: int) -> Way:
        if batch not in tried:
            planner = _planner(config, target, batch, say)
            text = _leanest(planner)
            if target.mesh is not None:
                say(f"compiling a batch of {batch:,}, {described(text)}")
            tried[batch] = planner.measure(text)
        return tried[batch]

    while not at(batch).fits and batch > unit:
        batch //= 2
    while 2 * batch < _BOUND and 2 * batch not in tried and at(2 * batch).fits:
        batch *= 2
    way = at(batch)
    if not way.fits:
        raise UserError(
            f"not even a batch of {batch} fits: it needs {way.bytes / 2**30:.3g} GiB a device, of "
            f"{low.room / 2**30:.3g} that a run may take; choose a smaller tower"
        )
    by = "compiler" if way.compiled else "estimate"
    return {"global_batch": batch, "bytes": way.bytes, "overrides": overrides(way.text), "by": by}


def _planner(config: Config, target: Target, batch: int, say: Say) -> Planner:
    """For the batch, whatever the config says of parts, which need not divide it."""
    return Planner(
        dataclasses.replace(
            config,
            stream=dataclasses.replace(config.stream, global_batch=batch),
            text=dataclasses.replace(config.text, keep="auto", parts=1),
        ),
        target,
        1.0,
        say,
    )


def _estimate(planner: Planner) -> int:
    text = _leanest(planner)
    return planner.needs(text).estimate(text)


def _leanest(planner: Planner) -> TextConfig:
    target = planner.target
    ways = candidates(planner.config, target.devices, target.platform == "cpu")
    return next(text for text in ways if text.keep == "embeddings")
