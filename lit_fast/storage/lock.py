"""A lock file, held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Self

from lit_fast.storage.files import local_path, make_directory
from lit_fast.storage.paths import StrPath, parent


class InUseError(Exception):
    """Another process holds the lock."""


class Lock:
    """An exclusive lock, held until `release`, the end of the `with` block or the end of the process.

    Raises:
      InUseError: another process still holds it after `wait` seconds.
    """

    def __init__(self, location: StrPath, wait: float = 0.0) -> None:
        make_directory(parent(location))
        self._file = open(local_path(location), "a")  # noqa: SIM115  (closed by release)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() >= deadline:
                    self._file.close()
                    raise InUseError(os.fspath(location)) from None
            time.sleep(0.05)

    def release(self) -> None:
        """Let other processes take the lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def is_locked(location: StrPath) -> bool:
    """Return whether a process holds the lock; False where there is no such file."""
    try:
        file = open(local_path(location), "rb")  # noqa: SIM115
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
