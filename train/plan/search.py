"""Search for the fastest candidate of a plan, and for the largest batch that fits."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from lit_fast.config import Config, TextConfig
from lit_fast.errors import UserError
from lit_fast.train.cost.memory import USABLE_SHARE, remat_candidates
from lit_fast.train.plan.candidates import Candidate, Planner, describe, overrides
from lit_fast.train.plan.target import Target
from lit_fast.utils.format import format_duration
from lit_fast.utils.output import status

MAX_COMPILES = 6  # of a search
_MATRIX_UNIT_TOKENS = 128  # rows of a matrix unit
_SMALLEST_ROWS = 2048  # rows per device of the smallest batch tried; it has several microbatches
_BATCH_BOUND = 2**30


def search(planner: Planner, default: Candidate) -> list[Candidate]:
    """Evaluate alternatives to the default candidate; return all, the fastest first.

    Every remat policy that is estimated to fit is evaluated. If they can be compiled, so are, for the fastest policy,
    packed rows and then other numbers of microbatches; their effect cannot be estimated. On a TPU these are twice and
    half as many; on a GPU, whose compiler gives no time, ever fewer, as the kernels are fewer.
    """
    config, found = planner.config, [default]

    def policies(pack: int, keep: str = "") -> list[TextConfig]:
        auto = dataclasses.replace(config.text, keep="auto", microbatches=1)
        packed = dataclasses.replace(config, text=planner.with_packing(auto, pack))
        first: dict[str, TextConfig] = {}
        for text in remat_candidates(packed, planner.target.devices, planner.target.platform):
            if keep in ("", text.keep) and planner.estimated_bytes(text) <= planner.usable_memory:
                first.setdefault(text.keep, text)
        return sorted(first.values(), key=planner.product_seconds)

    can_compile = planner.target.mesh is not None
    texts = policies(config.text.pack)
    if can_compile:
        texts = texts[: MAX_COMPILES - 3]  # leave compiles for packing and microbatches
    for text in texts:
        _add(planner, text, found)
    if can_compile and (best := fastest(planner, found)):
        pack = _pack_of_full_rows(planner)
        for text in policies(pack, best.text.keep) if pack > 1 else []:
            _add(planner, text, found)
    if can_compile and (best := fastest(planner, found)):
        factors = (0.5, 0.25, 0.125) if planner.target.platform == "gpu" else (2, 0.5)
        for microbatches in (max(int(best.text.microbatches * factor), 1) for factor in factors):
            text = dataclasses.replace(best.text, microbatches=microbatches)
            fits = planner.estimated_bytes(text) <= planner.usable_memory
            rows = text.rows // planner.target.devices if text.packed else planner.texts // text.pack
            if rows % microbatches == 0 and fits:
                _add(planner, text, found)
    return sorted(found, key=lambda candidate: (not candidate.fits, planner.relative_seconds(candidate)))


def fastest(planner: Planner, found: list[Candidate]) -> Candidate | None:
    """Return the fastest candidate that fits, if one does."""
    return min((c for c in found if c.fits), key=planner.relative_seconds, default=None)


def _pack_of_full_rows(planner: Planner) -> int:
    """Return the captions per row, a power of two, that fill the rows of a matrix unit."""
    text, data = planner.config.text, planner.data
    if text.dropout and not text.mask_padding:
        return 1
    tokens = data.lengths.mean() if text.mask_padding else data.vocabulary.max_length
    pack = 1
    while 2 * pack * tokens <= _MATRIX_UNIT_TOKENS and planner.texts % (2 * pack) == 0:
        pack *= 2
    return pack


def _add(planner: Planner, text: TextConfig, found: list[Candidate]) -> None:
    """Evaluate a text configuration if it is new and compiles are left."""
    if any(text == candidate.text for candidate in found) or planner.compiles >= MAX_COMPILES:
        return
    if planner.target.mesh is not None:
        longest = max((c.compiled.seconds for c in found if c.compiled), default=60)
        left = format_duration((MAX_COMPILES - planner.compiles) * longest)
        count = f"{planner.compiles + 1} of at most {MAX_COMPILES}"
        status(f"compiling {describe(text, planner.image_of(text))}, {count}; at most about {left} left")
    found.append(planner.evaluate(text))


def largest_batch(config: Config, target: Target) -> dict[str, Any]:
    """Find the largest batch that fits with `text.keep = "embeddings"`.

    Batches are a power of two x devices x captions per row. A step's memory is nearly linear in its batch: two
    estimates give the starting point. Then the compiler decides, if the target has one. On a GPU the microbatches are
    then doubled in size while the step fits, as fewer kernels run.

    Raises:
      UserError: not even a small batch fits.
    """
    unit = target.devices * config.text.pack
    smallest = unit * _SMALLEST_ROWS

    @cache
    def least_memory(batch: int) -> tuple[Planner, TextConfig]:
        # The microbatches of the configuration need not divide this batch.
        text = dataclasses.replace(config.text, keep="auto", microbatches=1, rows=0)
        image = dataclasses.replace(config.image, keep="auto", microbatches=1)
        stream = dataclasses.replace(config.stream, global_batch=batch)
        planner = Planner(dataclasses.replace(config, stream=stream, text=text, image=image), target)
        texts = remat_candidates(planner.config, target.devices, target.platform)
        return planner, next(text for text in texts if text.keep == "embeddings")

    def estimate(batch: int) -> int:
        planner, text = least_memory(batch)
        return planner.estimated_bytes(text)

    @cache
    def evaluate(batch: int) -> Candidate:
        planner, text = least_memory(batch)
        if target.mesh is not None:
            status(f"compiling a batch of {batch:,}, {describe(text, planner.image_of(text))}")
        return planner.evaluate(text)

    usable, base = USABLE_SHARE * target.chip.memory, estimate(smallest)
    slope = estimate(2 * smallest) - base
    batch = smallest
    while 2 * batch < _BATCH_BOUND and base + (2 * batch / smallest - 1) * slope <= usable:
        batch *= 2
    while not evaluate(batch).fits and batch > unit:
        batch //= 2
    while 2 * batch < _BATCH_BOUND and evaluate(2 * batch).fits:
        batch *= 2
    largest = evaluate(batch)
    if not largest.fits:
        raise UserError(
            f"a batch of {batch} does not fit: a step needs {largest.bytes / 2**30:.3g} GiB per device, of "
            f"{usable / 2**30:.3g} usable; choose a smaller tower"
        )
    planner, _ = least_memory(batch)
    while target.platform == "gpu" and largest.compiled and largest.text.microbatches % 2 == 0:
        text = dataclasses.replace(largest.text, microbatches=largest.text.microbatches // 2)
        if planner.estimated_bytes(text) > planner.usable_memory:
            break
        status(f"compiling a batch of {batch:,}, {describe(text, planner.image_of(text))}")
        larger = planner.evaluate(text)
        if not larger.fits or (larger.kernels or 0) > 0.9 * (largest.kernels or 0):
            break
        largest = larger
    by = "compiler" if largest.compiled else "estimate"
    return {
        "global_batch": batch,
        "bytes": largest.bytes,
        "kernels": largest.kernels if target.platform == "gpu" else None,
        "overrides": overrides(largest.text, largest.image),
        "by": by,
    }
