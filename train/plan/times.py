"""The seconds of a step: lower bounds, the compiler's estimate, assumed MFUs, and the one to plan by."""

from __future__ import annotations

from typing import Any

from lit_fast.train.cost.hlo import ASYNC_COPY, COLLECTIVES
from lit_fast.train.plan.candidates import Candidate, Planner

PAPER_MFU = 0.33  # of "Sigmoid Loss for Language Image Pre-Training" on TPU v4, from its hours
_USUAL_MFU = 0.25, 0.5
_LIMITING = 0.8  # a resource limits a step if it is busy for this share of it
# Of the bandwidth of the memory, reached by gathers and scatters of rows, for the upper end of an estimate.
_SCATTERED_SHARE = 0.1


def lower_bounds(planner: Planner, candidate: Candidate) -> dict[str, float]:
    """Return lower bounds of the seconds of a step, by limiting resource.

    Products take the time of the unit that computes them. Memory traffic: parameters, optimizer state, gradients and
    residuals are written and read, the batch is read. In a ring of n devices, each sends 2 (n - 1) / n of the bytes
    that are reduced, and n - 1 times those that are gathered.
    """
    memory, chip, n = planner.memory(candidate.text), planner.target.chip, planner.target.devices
    state = memory.parameters + memory.optimizer + memory.gradients
    residuals = memory.residuals(candidate.text) + memory.image_residuals(candidate.image)
    traffic = 2 * (state + residuals) + memory.batch
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
    sent = sum(share.get(name, (n - 1) / n) * c.bytes for name, c in candidate.collectives.items())
    return {
        "compute": planner.product_seconds(candidate.text),
        "memory bandwidth": traffic / chip.bandwidth,
        "interconnect": sent / chip.interconnect,
    }


def step_times(planner: Planner, candidate: Candidate, flops: float, mfu: float | None) -> dict[str, Any]:
    """Return the times of a step as JSON values.

    The time to plan by is, in this order, that of a stated MFU, the compiler's estimate, that of the paper's MFU; the
    last is at least the time of the products and of starting the kernels. None of them is a measurement.

    Args:
      flops: model FLOPs of a step per device.
      mfu: stated by the user; None: not.
    """
    chip, config, program = planner.target.chip, planner.config, candidate.program
    bounds = lower_bounds(planner, candidate)
    seconds = {"floor": max(bounds.values())}
    if candidate.compiler_seconds is not None:
        seconds["compiler"] = candidate.compiler_seconds
    busy = planner.product_seconds(candidate.text) + planner.kernel_seconds(candidate)
    at_paper_mfu = flops / chip.flops / PAPER_MFU
    seconds["paper"] = max(at_paper_mfu, busy)
    if mfu is not None:
        seconds["stated"] = flops / chip.flops / mfu
    by = next(name for name in ("stated", "compiler", "paper") if name in seconds)
    low, high = seconds[by], seconds[by]
    if by == "paper":
        high, low = (flops / chip.flops / share for share in _USUAL_MFU)
        low = max(low, planner.product_seconds(candidate.text))
    elif by == "compiler" and program:
        low -= program.half_cycles / 2 / chip.clock
        known = (*COLLECTIVES, ASYNC_COPY)
        moved = sum(u.bytes for name, u in program.unestimated.items() if name not in known)
        high += bounds["interconnect"] + moved / (_SCATTERED_SHARE * chip.bandwidth)
    return {
        "floors": bounds,
        "limit": max(bounds, key=lambda name: bounds[name]),
        "kernels_limit": busy > at_paper_mfu,
        "limited": seconds["floor"] >= _LIMITING * seconds[by],
        "times": {
            name: {
                "seconds": s,
                "mfu": flops / s / chip.flops,
                "hours": config.steps * s / 3600,
                "rows_per_second": config.stream.global_batch / s,
            }
            for name, s in seconds.items()
        },
        "planning": {
            "by": by,
            "seconds": seconds[by],
            "low_seconds": min(max(low, seconds["floor"]), seconds[by]),
            "high_seconds": max(high, seconds[by]),
            "mfu": flops / seconds[by] / chip.flops,
        },
    }
