"""What a training shows while it works: a bar on a terminal, elsewhere a line per log interval."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

import jax

from lit_fast.utils.format import format_duration
from lit_fast.utils.progress import Progress


class Console:
    """Shows the steps of one part of a run on stderr; `start` were done by earlier parts."""

    def __init__(self, steps: int, start: int) -> None:
        self._steps = steps
        self._first: tuple[int, float] | None = None  # step and time of the first line: compilation is over
        self._bar = Progress("train", steps, "steps", start=start) if sys.stderr.isatty() else None
        self._note = ""

    def advance(self) -> None:
        """Count a step."""
        if self._bar:
            self._bar.advance(1, self._note)

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Show the figures after step `number`, which may lag behind the steps that were counted."""
        figures = _figures(values)
        if self._bar:
            self._note = "  ".join(part.strip() for part in figures)
            return
        now = time.monotonic()
        first, then = self._first = self._first or (number, now)
        left = (self._steps - number) * (now - then) / (number - first) if number > first else math.inf
        width = len(f"{self._steps:,}")
        parts = [f"step {number:{width},}/{self._steps:,}", *figures, f"{format_duration(left):>6} left"]
        print("  ".join(parts), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar:
            self._bar.close(self._note)


def _figures(values: Mapping[str, float]) -> list[str]:
    """In columns, so that lines stand under each other; not a number is printed as nan."""
    figures = [
        f"loss {values['loss']:8.4f}",
        f"{values['pairs_per_second']:9,.0f} pairs/s",
        f"data wait {100 * values['data_wait_share']:5.1f} %",
    ]
    if "mfu" in values:
        figures.insert(2, f"MFU {100 * values['mfu']:4.1f} %")
    return figures


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _report(text: str) -> None:
    if jax.process_index() == 0:
        print(text)
