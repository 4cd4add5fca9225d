"""Ctrl-C and SIGTERM at a time that suits the work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Signals that come inside go to the list and are raised at the end; the second one ends the process.

    An exception out of a signal may be swallowed where it happens to strike, in a callback of a library, or
    leave a device at work on arrays that are gone.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield came
        return

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise SystemExit(128 + number)
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])
