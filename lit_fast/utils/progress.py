"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lit_fast.utils.format import format_duration
from lit_fast.utils.output import status, write_status

_BAR_WIDTH = 24  # characters


class Progress:
    """Counts finished units out of `total` and shows rate and remaining time.

    On a terminal one line is redrawn four times a second. Elsewhere a plain line is printed every `every` seconds.

    Args:
      label: the first word of the line.
      total: units of the whole work.
      unit: their name, in the plural.
      start: units finished by an earlier process, which do not count for the rate.
      every: seconds between plain lines.
    """

    def __init__(self, label: str, total: int, unit: str, *, start: int = 0, every: float = 10.0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, start
        self._start, self._start_time = start, time.monotonic()
        self._bar = sys.stderr.isatty()
        self._interval = 0.25 if self._bar else every
        self._last_shown = self._start_time if not self._bar else 0.0

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more; `note` is shown at the end of the line."""
        self.done += units
        now = time.monotonic()
        if now - self._last_shown >= self._interval and self.done < self.total:  # `close` shows the end
            self._last_shown = now
            self._show(self._line(now, note))

    def close(self, note: str = "") -> None:
        """Show the final state and end the line."""
        self._show(self._line(time.monotonic(), note))
        if self._bar:
            write_status("\n")

    def rate(self) -> float:
        """Return the units per second of this process."""
        return (self.done - self._start) / max(time.monotonic() - self._start_time, 1e-9)

    def _line(self, now: float, note: str) -> str:
        rate = self.rate()
        if self.done < self.total:
            left = (self.total - self.done) / rate if rate > 0 else float("inf")
            timing = f"{format_duration(left)} left"
        else:
            timing = format_duration(now - self._start_time)
        bar = ""
        if self._bar:
            filled = int(_BAR_WIDTH * (self.done / self.total if self.total else 1.0))
            bar = "[" + "#" * filled + "." * (_BAR_WIDTH - filled) + "] "
        counts = f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.1f} {self.unit}/s, {timing}"
        return f"{self.label} {bar}{counts}{'  ' + note if note else ''}"

    def _show(self, line: str) -> None:
        if self._bar:  # a wrapped line could not be redrawn
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        write_status(line if self._bar else line + "\n")


@contextmanager
def report_elapsed(label: str, every: float = 15.0) -> Iterator[None]:
    """Print a line with the elapsed time every `every` seconds while the body runs, for work of unknown progress."""
    start, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(every):
            status(f"{label}: {format_duration(time.monotonic() - start)} so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
