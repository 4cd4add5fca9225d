"""Run one case of `benchmarks.step` in a process of its own.

python -m benchmarks.step_worker --case '{"rival": "open_clip", "batch": 512, ...}'
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
from typing import Any

from benchmarks.machine import measure, peak_memory, turn
from benchmarks.step_case import ENOUGH, MEMORY, REPEATS, Case


def run(case: Case, turns: bool = False) -> dict[str, Any]:
    """Return time, memory and losses of one case; with turns, wait for one before each step."""
    # Import only the rival's libraries: they count as memory.
    if case.rival in ("ours", "big_vision"):
        if case.rival == "ours":
            from lit_fast.cli.options import reuse_memory

            reuse_memory()  # as `lit-fast train`
        from benchmarks import step_jax

        if case.compile_only:
            return step_jax.memory_by_compiler(case)
        build = step_jax.ours if case.rival == "ours" else step_jax.big_vision
    else:
        from benchmarks import step_torch

        build = step_torch.open_clip if case.rival == "open_clip" else step_torch.torch_loop
    try:
        rival = build(case)
        ctypes.CDLL(None).malloc_trim(0)  # return the compiler's memory, which is not the step's
        losses: list[float] = []
        cost = measure(
            lambda: losses.append(rival.step()), REPEATS, before=turn if turns else None, enough=ENOUGH
        )
    except (MemoryError, RuntimeError) as error:  # JAX's own errors are RuntimeErrors as well
        words = ("out of memory", "resource_exhausted", "can't allocate", "bad_alloc")
        if isinstance(error, MemoryError) or any(word in str(error).lower() for word in words):
            return {"failed": "out of memory"}
        raise
    return {
        "median": cost.median,
        "lowest": cost.lowest,
        "highest": cost.highest,
        "repeats": cost.repeats,
        "memory": (rival.peak_memory or peak_memory)(),
        "parameters": rival.parameters,
        "losses": losses[:2],
        "note": rival.note,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    parser.add_argument("--turns", action="store_true", help="wait for a line of stdin before each step")
    args = parser.parse_args()
    case = Case(**json.loads(args.case))
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    print(json.dumps(run(case, args.turns)))


if __name__ == "__main__":
    main()
