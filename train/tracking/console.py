"""Show training progress: a bar on a terminal, elsewhere a line per log interval."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from lit_fast.utils.format import format_duration
from lit_fast.utils.output import status
from lit_fast.utils.progress import Progress


class Console:
    """Shows steps and metrics on stderr.

    Args:
      steps: of the whole run.
      start_step: the step from which the run starts or resumes.
    """

    def __init__(self, steps: int, start_step: int) -> None:
        self._steps = steps
        self._first: tuple[int, float] | None = None  # step and time of the first line, after compilation
        self._bar = Progress("train", steps, "steps", start=start_step) if sys.stderr.isatty() else None
        self._note = ""

    def advance(self) -> None:
        """Count a step."""
        if self._bar:
            self._bar.advance(1, self._note)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics after `step`; more steps may be counted already."""
        columns = _columns(values)
        if self._bar:
            self._note = "  ".join(column.strip() for column in columns)
            return
        now = time.monotonic()
        first_step, first_time = self._first = self._first or (step, now)
        left = math.inf
        if step > first_step:
            left = (self._steps - step) * (now - first_time) / (step - first_step)
        width = len(f"{self._steps:,}")
        parts = [f"step {step:{width},}/{self._steps:,}", *columns, f"{format_duration(left):>6} left"]
        status("  ".join(parts))

    def close(self) -> None:
        """End the line of the bar."""
        if self._bar:
            self._bar.close(self._note)


def _columns(values: Mapping[str, float]) -> list[str]:
    """Format the main metrics in columns of fixed width."""
    columns = [
        f"loss {values['loss']:8.4f}",
        f"{values['pairs_per_second']:9,.0f} pairs/s",
        *([f"{values['images_per_second']:9,.0f} images/s"] if "images_per_second" in values else []),
        f"data wait {100 * values['data_wait_share']:5.1f} %",
    ]
    if "mfu" in values:
        columns.insert(-1, f"MFU {100 * values['mfu']:4.1f} %")
    return columns
