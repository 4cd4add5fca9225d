"""Handle Ctrl-C (SIGINT) and SIGTERM, which clusters send before preemption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], None]


def install_handler(handler: Handler, numbers: Sequence[int] = SIGNALS) -> dict[int, Any]:
    """Install a handler of signals and return the previous handlers by signal.

    Only the main thread may handle signals; in any other nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def record_signals() -> tuple[list[int], dict[int, Any]]:
    """Record the first signal instead of acting on it; a second one ends the process.

    Returns:
      A list, empty until a signal is received, and the previous handlers by signal.
    """
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)

    return received, install_handler(record)


@contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Yield a list that receives the first signal; act on the signal at the end of the block.

    An exception from a signal handler may be swallowed in a callback of a library, or leave a device at work on
    arrays that were freed.
    """
    received, previous = record_signals()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
