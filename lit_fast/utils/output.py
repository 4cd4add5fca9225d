"""Lines for the user: status on stderr, results on stdout. The only module that calls `print`."""

from __future__ import annotations

import sys

_silent = False


def status(text: str) -> None:
    """Print a line about the work in progress to stderr."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


def result(text: str) -> None:
    """Print what a command was run for to stdout."""
    if not _silent:
        print(text, flush=True)


def silence() -> None:
    """Print nothing from now on; called in all processes of a job but the first."""
    global _silent
    _silent = True


def failure(text: str) -> None:
    """Print the line on which a command ends to stderr; also in processes that are silent."""
    print(text, file=sys.stderr, flush=True)
