"""Lines for the user: status on stderr, results on stdout. The only module that calls `print`.

A character that a stream cannot encode is shown as `\\xe9`. A stream that was closed
before the start drops its lines. If the reader of a stream is gone, the process ends with the status of SIGPIPE.
"""

from __future__ import annotations

import io
import os
import sys

from lit_fast.errors import UserError

SIGPIPE_STATUS = 141  # 128 + SIGPIPE

_silent = False


def prepare_streams() -> None:
    """Make stdout and stderr accept every character, and replace those that were closed before the start.

    Descriptors 1 and 2 must be open, see `lit_fast.storage.machine.open_standard_descriptors`.
    """
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def status(text: str) -> None:
    """Print a line about the work in progress to stderr."""
    if not _silent:
        write_status(f"{text}\n")


def write_status(text: str) -> None:
    """Write to stderr, where a text without a final newline is redrawn by the next; also in silent processes."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _discard()
        raise SystemExit(SIGPIPE_STATUS) from None  # passes through `except Exception`
    except OSError:  # a terminal that is gone, a log on a full disk: the work is worth more than the line
        pass


def result(text: str) -> None:
    """Print the result of a command to stdout.

    Raises:
      UserError: stdout cannot be written, for example because it is a file on a full disk.
      SystemExit: the reader of stdout is gone.
    """
    if not _silent:
        _print_result(text, "\n")


def flush() -> None:
    """Write the text that stdout still buffers; raises as `result`."""
    _print_result("", "")


def _print_result(text: str, end: str) -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _discard()
        raise SystemExit(SIGPIPE_STATUS) from None
    except OSError as error:
        sys.stdout = io.StringIO()
        raise UserError(f"stdout cannot be written: {error.strerror}; redirect it elsewhere") from None


def silence() -> None:
    """Print nothing from now on; called in all processes of a job but the first."""
    global _silent
    _silent = True


def failure(text: str) -> None:
    """Print the line on which a command ends to stderr; also in processes that are silent."""
    write_status(f"{text}\n")


def _discard() -> None:
    """Drop the buffered text and all later lines: at exit Python would fail to write them."""
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
