"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time


class Progress:
    """Counts done units out of `total` and shows rate and time left.

    On a terminal one line is redrawn four times a second; elsewhere a plain line is printed every
    `every` seconds, so that a log stays readable. `start` units were done by an earlier process and do
    not count for the rate.
    """

    def __init__(self, what: str, total: int, unit: str, *, start: int = 0, every: float = 10.0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, start
        self._start, self._began = start, time.monotonic()
        self._bar = sys.stderr.isatty()
        self._pause = 0.25 if self._bar else every
        self._shown = self._began if not self._bar else 0.0

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more; `note` is shown at the end of the line."""
        self.done += units
        now = time.monotonic()
        if now - self._shown >= self._pause and self.done < self.total:  # the end is shown by close
            self._shown = now
            self._print(self._line(now, note))

    def close(self, note: str = "") -> None:
        """Show the final state and end the line."""
        self._print(self._line(time.monotonic(), note))
        if self._bar:
            sys.stderr.write("\n")

    def rate(self) -> float:
        """Units per second since this process began."""
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def _line(self, now: float, note: str) -> str:
        rate = self.rate()
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        share = self.done / self.total if self.total else 1.0
        bar = ""
        if self._bar:
            bar = "[" + "#" * int(24 * share) + "." * (24 - int(24 * share)) + "] "
        tail = f"{rate:,.1f} {self.unit}/s"
        if self.done < self.total:
            tail += f", {duration(left)} left"
        else:
            tail += f", {duration(now - self._began)}"
        return (
            f"{self.what} {bar}{self.done:,}/{self.total:,} {self.unit}, {tail}{'  ' + note if note else ''}"
        )

    def _print(self, line: str) -> None:
        if self._bar:  # a line that wraps could not be drawn over
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(line if self._bar else line + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """`75 s` -> `1m15s`; `inf` -> `?`."""
    if not seconds < 1e9:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
