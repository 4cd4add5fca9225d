"""A trace of some steps, for TensorBoard's profiler or ui.perfetto.dev."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jax

from lit_fast.errors import UserError
from lit_fast.train.tracking.throughput import Span


def parse_steps(text: str, steps: int) -> range:
    """`A:B` -> the steps A to B, counted from 1, both included; none for an empty text.

    Raises:
      UserError: no such range in a run of `steps`.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not found:
        raise UserError(f"--profile-steps {text} is not A:B, two steps such as 20:24")
    first, last = map(int, found.groups())
    if last < first:
        raise UserError(f"--profile-steps {text} is empty; its second step must not be before its first")
    if first < 2 or last > steps:
        raise UserError(
            f"--profile-steps {text} must be within 2:{steps}; step 1 is spent on compiling, {steps} is the last"
        )
    return range(first, last + 1)


class Profile:
    """Traces the given steps into W/profile/, in the first process only.

    The first step after `done` compiles and is never in the trace. The time that the profiler takes for itself
    is spent under `paused`.
    """

    def __init__(self, run: Path, steps: range, done: int, paused: Span) -> None:
        self._directory, self._paused = run / "profile", paused
        self._running = False
        rest = range(max(steps.start, done + 2), steps.stop) if steps else steps
        if steps and not rest and jax.process_index() == 0:
            print(f"steps {steps[0]}:{steps[-1]} are not profiled: the run is past them", file=sys.stderr)
        self._steps = rest if jax.process_index() == 0 else range(0)

    def begin(self, number: int, state: Any) -> None:
        """To be called before step `number`; `state` is what it starts from."""
        if self._steps and number == self._steps[0]:
            jax.block_until_ready(state)  # the steps before shall not be in it
            with self._paused:
                jax.profiler.start_trace(self._directory)
            self._running = True

    def end(self, number: int, state: Any) -> None:
        """To be called after step `number`; `state` is what it ends with."""
        if self._running and number == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()
            steps = f"{self._steps[0]}:{self._steps[-1]}"
            print(
                f"profile of steps {steps} in {self._directory}: tensorboard --logdir {self._directory}, or open "
                "the .trace.json.gz below it in ui.perfetto.dev",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Write the trace, also of a run that ends in its midst."""
        if self._running:
            self._running = False
            with self._paused:
                jax.profiler.stop_trace()
