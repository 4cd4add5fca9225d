"""Which process holds a lock, and whether it still exists."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import Self

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_NAMESPACES = ("pid", "time")  # a process id has a meaning in the first, a start time in the second


@dataclass(frozen=True)
class Holder:
    """One holding of a lock by one process."""

    token: str  # random, so that no two holdings are equal
    host: str
    command: str
    since: int  # seconds since 1970 on the clock of `host`, for messages only
    pid: int
    start: int  # clock ticks from boot to the start of the process; 0: unknown
    kernel: str  # boot of the machine and namespaces of the process; "": unknown

    @classmethod
    def this_process(cls) -> Self:
        """Return a new holding by this process."""
        start, _ = _start_and_threads(os.getpid()) or (0, 0)
        host, token, since = socket.gethostname(), secrets.token_hex(8), int(time.time())
        return cls(token, host, _command(), since, os.getpid(), start, _kernel())

    @classmethod
    def decode(cls, data: bytes) -> Self | None:
        """Invert `encode`; None for anything else."""
        try:
            holder = cls(**json.loads(data))
        except (ValueError, TypeError, RecursionError):
            return None
        types = {"since": int, "pid": int, "start": int}
        known = all(type(getattr(holder, f.name)) is types.get(f.name, str) for f in fields(cls))
        return holder if known and holder.pid > 0 else None

    def encode(self) -> bytes:
        """Return one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def exists(self) -> bool | None:
        """Return whether the process exists; None where this cannot be known.

        It is known for a process of the same boot of the same machine, whose process ids and start times have the
        same meaning here. A process of that id that started at another time is another one.
        """
        if not self.kernel or not self.start or self.kernel != _kernel():
            return None
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # it exists and is another user's
            pass
        found = _start_and_threads(self.pid)
        if found is None:  # hidden, or it has just ended
            return None
        start, threads = found
        return start == self.start and threads > 0

    def __str__(self) -> str:
        try:
            since = time.strftime(", since %Y-%m-%d %H:%M", time.localtime(self.since))
        except (OverflowError, ValueError, OSError):
            since = ""
        return f"`{_printable(self.command)}` (process {self.pid} on {_printable(self.host)}{since})"


def _start_and_threads(pid: int) -> tuple[int, int] | None:
    """Return the start time of a process in clock ticks after boot, and its threads; None where Linux has neither.

    A killed process whose parent has not noticed has no thread.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program, in parentheses, may contain anything.
            state, *values = file.read().rpartition(b")")[2].split()
        threads, start = int(values[16]), int(values[18])
    except (OSError, ValueError, IndexError):
        return None
    return start, threads - (state in (b"Z", b"X"))


def _kernel() -> str:
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # /proc of other namespaces
            return ""
        with open(_BOOT_ID) as file:
            boot = file.read().strip()
        return "/".join([boot, *(str(os.stat(f"/proc/self/ns/{name}").st_ino) for name in _NAMESPACES)])
    except OSError:
        return ""


def _command() -> str:
    """Return the name of the program, for `lit-fast` with its command."""
    path, *arguments = sys.argv or [""]
    if os.path.basename(path) == "__main__.py":
        path = os.path.dirname(path)
    name = os.path.basename(path).replace("lit_fast", "lit-fast")
    if name == "lit-fast" and arguments:
        return f"{name} {arguments[0]}"
    return "python" if name in ("", "-c") else name


def _printable(text: str) -> str:
    return "".join(c for c in text[:100] if c.isprintable())
