"""Trace some steps for TensorBoard's profiler or ui.perfetto.dev."""

from __future__ import annotations

import re
from typing import Any

import jax

from lit_fast.errors import UserError
from lit_fast.storage.files import local_path
from lit_fast.storage.paths import join
from lit_fast.train.tracking.throughput import Stopwatch
from lit_fast.utils.output import status


def parse_profile_steps(text: str, steps: int) -> range:
    """Parse `A:B`, two steps counted from 1, both included; an empty text is no steps.

    Raises:
      UserError: the text is no such range in a run of `steps`.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not found:
        raise UserError(f"--profile-steps {text} is not A:B; give two steps such as 20:24")
    first, last = map(int, found.groups())
    if last < first:
        raise UserError(f"--profile-steps {text} is empty; give a second step that is not before the first")
    if first < 2 or last > steps:
        raise UserError(
            f"--profile-steps {text} must be within 2:{steps}; step 1 includes compilation, {steps} is the last"
        )
    return range(first, last + 1)


class Profiler:
    """Traces the given steps into W/profile, in the first process only.

    The first step after `start_step` includes compilation and is never traced. The profiler's own time is spent
    under `paused`.
    """

    def __init__(self, workdir: str, steps: range, start_step: int, paused: Stopwatch) -> None:
        self._directory, self._paused = local_path(join(workdir, "profile")), paused
        self._running = False
        rest = range(max(steps.start, start_step + 2), steps.stop) if steps else steps
        if steps and not rest:
            status(f"steps {steps[0]}:{steps[-1]} are not profiled: the run is past them")
        self._steps = rest if jax.process_index() == 0 else range(0)

    def before_step(self, step: int, state: Any) -> None:
        """Start the trace if `step` is the first one; `state` is the input of the step."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)  # keep earlier steps out of the trace
            with self._paused:
                jax.profiler.start_trace(self._directory)
            self._running = True

    def after_step(self, step: int, metrics: Any) -> None:
        """End the trace if `step` is the last one; `metrics` are an output of the step."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()
            status(
                f"profile of steps {self._steps[0]}:{self._steps[-1]} in {self._directory}: tensorboard --logdir "
                f"{self._directory}, or open the .trace.json.gz below it in ui.perfetto.dev"
            )

    def close(self) -> None:
        """Write the trace, also of a run that ends before the last traced step."""
        if self._running:
            self._running = False
            with self._paused:
                jax.profiler.stop_trace()
