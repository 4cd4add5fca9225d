"""Locks that one process holds at a time, on any file system and between machines.

A lock is a lease file (`lit_fast.storage.lease_file`) that names its holder and is deleted at the end. Locks of the
file system are not used: some have none, and some only pretend. The holder touches the file regularly, so that a
process that was killed does not keep the lock:

- If the holder ran on this machine and does not exist any more, the lock is taken over at once.
- Otherwise it is taken over once this process has seen no touch for a minute by its own clock.

A holder that was suspended may lose its lock like this, so it calls `check` before it commits something. Where others
would not see a commit as a whole, it calls `check_recent` before each write.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, auto
from typing import Self

from lit_fast.errors import MachineError, UserError, os_reason
from lit_fast.storage.files import exists, local_path, remove
from lit_fast.storage.holder import Holder
from lit_fast.storage.lease_file import LeaseFile, create_lease, read_lease, swap_lease, touch_lease
from lit_fast.storage.paths import StrPath, is_bucket, parent
from lit_fast.utils.output import status

TOUCH_SECONDS = 10.0
ABANDONED_SECONDS = 60.0  # without a touch; garbage collection and a slow server may delay several
_POLL_SECONDS = 0.05

# Also counts while the machine is suspended, where the operating system has such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

_held: set[str] = set()  # tokens of this process


class InUseError(UserError):
    """Another process holds the lock."""


class LostLockError(MachineError):
    """Another process has taken the lock over."""


class Lock:
    """An exclusive lock, held until `release`, the end of the `with` block or the end of the process.

    Raises:
      InUseError: another process still holds it after `wait` seconds.
      UserError: the lease file cannot be written.
    """

    def __init__(
        self,
        location: StrPath,
        target: StrPath,
        remedy: str,
        *,
        wait: float = 0.0,
        watch: LockWatch | None = None,
    ) -> None:
        """Take the lock.

        Args:
          location: path of the lease file.
          target: what the lock protects, for messages.
          remedy: what to do instead of waiting for the other process, for messages.
          watch: what this process has seen of the lock before.
        """
        self._location, self._target = os.fspath(location), os.fspath(target)
        holder = Holder.this_process()
        self._token, self._data, self._process = holder.token, holder.encode(), holder.pid
        self._stop = threading.Event()
        self._touching = threading.Lock()  # two touches at a time would refuse each other
        self._confirmed = _clock()  # when this process last knew that nobody else held the lock
        try:
            self._made_directory = not is_bucket(location) and not exists(parent(location))
            _held.add(self._token)
            self._take(remedy, wait, watch or LockWatch(self._location))
        except BaseException as error:
            _held.discard(self._token)
            if isinstance(error, OSError):
                raise _write_error(self._location, error) from None
            raise
        threading.Thread(target=self._touch, name="lock", daemon=True).start()

    def check_recent(self) -> None:
        """Do as `check`, unless the lock was confirmed so recently that nobody else can have taken it over."""
        if _clock() - self._confirmed > ABANDONED_SECONDS / 2:
            self.check()

    def check(self) -> None:
        """Raise LostLockError if this process has lost the lock; call it before something is committed."""
        try:
            if self._confirm():
                return
            lease = read_lease(self._location)
        except OSError as error:
            raise LostLockError(
                f"{error.filename or self._location} cannot be used: {os_reason(error)}; fix the cause, then rerun the "
                "same command"
            ) from None
        if lease is None:
            raise LostLockError(
                f"{self._location} was deleted, so that others may write {self._target}; rerun the same command once "
                "no other process does"
            )
        raise LostLockError(
            f"{self._target} was taken over by {Holder.decode(lease.data) or 'another process'}, because this "
            f"process was suspended for {ABANDONED_SECONDS:.0f} s; rerun the same command once that has ended"
        )

    def release(self) -> None:
        """Let other processes take the lock; delete its directory if that was made for it and is empty."""
        if self._stop.is_set() or self._process != os.getpid():  # a forked process does not hold it
            return
        self._stop.set()
        try:
            claim = Holder.this_process().encode()
            with self._touching:
                swap_lease(self._location, self._data, claim, lambda _: False, delete=True)
        except OSError:  # a full disk has no place for a claim
            with suppress(OSError):
                lease = read_lease(self._location)
                if lease is not None and lease.data == self._data:
                    remove(self._location)
        except UserError:  # the bucket cannot be used: others wait until the lock is abandoned
            pass
        _held.discard(self._token)
        if self._made_directory:
            with suppress(OSError):
                os.rmdir(local_path(parent(self._location)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self, remedy: str, wait: float, watch: LockWatch) -> None:
        deadline = time.monotonic() + wait
        while not create_lease(self._location, self._data):
            state = watch.look()
            if watch.data == self._data:
                return
            if state is _State.ABANDONED:
                watch.take_over(self._data)
            if state is _State.HELD and time.monotonic() >= deadline:
                raise _in_use(self._target, watch, remedy)
            watch.pause(state, self._target)

    def _confirm(self) -> bool:
        """Touch the file, if this process still holds the lock; return whether it does. Raises OSError."""
        with self._touching:
            started = _clock()
            if self._stop.is_set() or not touch_lease(self._location, self._data):
                return False
            self._confirmed = started
            return True

    def _touch(self) -> None:
        while not self._stop.wait(TOUCH_SECONDS):
            with suppress(OSError, UserError):  # `check` reports what lasts
                if not self._confirm():
                    return


def is_locked(location: StrPath) -> bool:
    """Return whether a process may hold the lock, without waiting for a sign of it."""
    return LockWatch(location).is_held()


def check_unlocked(locations: Sequence[StrPath], target: StrPath, remedy: str) -> None:
    """Raise InUseError if a process holds one of the locks; delete abandoned ones. Arguments as for `Lock`."""
    watches = [LockWatch(location) for location in locations]
    while watches:
        uncertain = []
        for watch in watches:
            try:
                state = watch.look()
            except OSError as error:
                raise UserError(
                    f"{error.filename or target} cannot be read: {os_reason(error)}; delete it"
                ) from None
            if state is _State.HELD:
                raise _in_use(target, watch, remedy)
            if state is _State.UNCERTAIN:
                uncertain.append(watch)
            if state is _State.ABANDONED:
                watch.delete()
        watches = uncertain
        if watches:
            watches[0].pause(_State.UNCERTAIN, target)


class _State(Enum):
    FREE = auto()
    HELD = auto()
    ABANDONED = auto()
    UNCERTAIN = auto()  # it may be held by a process of another machine


class LockWatch:
    """What this process has seen of a lock, over time.

    Attributes:
      holder: the process that holds or held it; None where that is unknown.
    """

    def __init__(self, location: StrPath) -> None:
        self.holder: Holder | None = None
        self._location = location
        self._first: LeaseFile | None = None  # the first look at the present content and beat
        self._since = 0.0  # time of that look
        self._has_reported = False

    def is_held(self) -> bool:
        """Return whether a process may hold the lock, without waiting for a sign of it."""
        try:
            return self.look() in (_State.HELD, _State.UNCERTAIN)
        except OSError:
            return True

    def look(self) -> _State:
        """Read the file; raises OSError."""
        lease = read_lease(self._location)
        if lease is None:
            self._first = None
            return _State.FREE
        if self._first is None or lease.data != self._first.data:
            self._first, self._since = lease, time.monotonic()
            self.holder = Holder.decode(lease.data)
        process_exists = self.holder.exists() if self.holder else None
        if process_exists and self.holder and self.holder.pid == os.getpid():
            process_exists = self.holder.token in _held
        if process_exists is False:
            return _State.ABANDONED
        if lease.beat != self._first.beat:
            self._first, self._since = lease, time.monotonic()
            return _State.HELD
        if process_exists:
            return _State.HELD
        return _State.ABANDONED if self._quiet() >= ABANDONED_SECONDS else _State.UNCERTAIN

    @property
    def data(self) -> bytes | None:
        """The content that `look` has read; None where there was no file."""
        return self._first.data if self._first else None

    def take_over(self, data: bytes) -> None:
        """Replace the abandoned content, unless another process does it; `look` shows which. Raises OSError."""
        if self._first:
            swap_lease(self._location, self._first.data, data, self._is_claim_abandoned)

    def delete(self) -> None:
        """Delete the abandoned file if that is possible, so that the next command need not wait for it."""
        if self._first:
            claim = Holder.this_process().encode()
            with suppress(OSError, UserError):
                swap_lease(self._location, self._first.data, claim, self._is_claim_abandoned, delete=True)

    def pause(self, state: _State, target: StrPath) -> None:
        """Wait before the next look."""
        quiet = self._quiet()
        if state is _State.UNCERTAIN and quiet > 1 and not self._has_reported:
            holder = self.holder or "another process"
            status(f"waiting up to {ABANDONED_SECONDS:.0f} s: {holder} may still be writing {target}")
            self._has_reported = True
        if state in (_State.HELD, _State.UNCERTAIN):
            time.sleep(min(1.0, _POLL_SECONDS + quiet / 10))
        elif state is _State.ABANDONED:
            time.sleep(_POLL_SECONDS / 10)  # for others that take it over

    def _is_claim_abandoned(self, data: bytes) -> bool:
        holder = Holder.decode(data)
        # A claim is not touched. Its process needs milliseconds and has had a minute since the file was abandoned.
        return (holder is not None and holder.exists() is False) or self._quiet() >= 2 * ABANDONED_SECONDS

    def _quiet(self) -> float:
        return time.monotonic() - self._since if self._first else 0.0


def _clock() -> float:
    """Return seconds since an arbitrary moment."""
    return time.clock_gettime(_CLOCK)


def _in_use(target: StrPath, watch: LockWatch, remedy: str) -> InUseError:
    holder = watch.holder or "another process"
    return InUseError(f"{os.fspath(target)} is being written by {holder}; wait for it or {remedy}")


def _write_error(location: str, error: OSError) -> UserError:
    file = error.filename or location
    return UserError(
        f"{file} cannot be written: {os_reason(error)}; fix the cause, then rerun the same command"
    )
