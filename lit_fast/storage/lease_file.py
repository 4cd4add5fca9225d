"""Lease files: the content of a file changes only from what the writer has read.

A file is created with `O_EXCL`, which needs no locks of the file system. To replace or delete content X, a process
first creates the claim file of X, so that only one does, and reads the file again. No content may occur twice.

In a bucket the writes themselves are conditional. A second line there holds a random beat, since writing equal content
again does not change an object's generation everywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from typing import NamedTuple

from lit_fast.storage.files import buckets, local_path, make_directory, remove
from lit_fast.storage.paths import StrPath, is_bucket, join, name, parent

_MAX_BYTES = 1 << 16


class LeaseFile(NamedTuple):
    """What was read of a lease file."""

    data: bytes  # empty while it is created
    beat: int  # changes with each `touch`


def read_lease(location: StrPath) -> LeaseFile | None:
    """Read a lease file; None where there is none. Raises OSError."""
    if is_bucket(location):
        return _read_object(os.fspath(location))[0]
    # A pipe of that name must not be waited for. Opening also makes NFS ask its server for the time of the file.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(local_path(location), flags)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(location))
        return LeaseFile(os.read(descriptor, _MAX_BYTES), status.st_mtime_ns)
    finally:
        os.close(descriptor)


def create_lease(location: StrPath, data: bytes) -> bool:
    """Create a lease file and the directories above; return False if there is one. Raises OSError."""
    if is_bucket(location):
        return _write_object(os.fspath(location), data, buckets().ABSENT)
    path = local_path(location)
    while True:
        make_directory(parent(path))
        try:
            file = open(path, "xb")  # noqa: SIM115
            break
        except FileExistsError:
            return False
        except FileNotFoundError:  # the last holder has just deleted the directory
            continue
    try:
        with file:
            file.write(data)
    except BaseException:
        os.unlink(path)
        raise
    return True


def swap_lease(
    location: StrPath,
    old: bytes,
    new: bytes,
    is_abandoned: Callable[[bytes], bool],
    *,
    delete: bool = False,
) -> bool:
    """Replace the content `old` by `new`, or delete the file.

    Args:
      new: the content of the claim file, and then of the file.
      is_abandoned: whether the process that wrote this content into a claim file will never finish.

    Returns:
      Whether this process did it; False if the content is not `old`, or another process is replacing it.

    Raises:
      OSError: the file cannot be replaced.
    """
    if is_bucket(location):
        url = os.fspath(location)
        lease, generation = _read_object(url)
        if lease is None or lease.data != old:
            return False
        return buckets().delete(url, generation) if delete else _write_object(url, new, generation)
    path = local_path(location)
    claim = _claim(path, old)
    if not create_lease(claim, new):
        other = read_lease(claim)
        if other is None or not is_abandoned(other.data):
            return False
        if not swap_lease(claim, other.data, new, is_abandoned):
            return False
    moved = False
    try:
        found = read_lease(path)
        if found is None or found.data != old:
            return False
        if delete:
            os.unlink(path)
        else:
            os.replace(claim, path)
            moved = True
        return True
    except FileNotFoundError:  # this process was suspended, and another has taken its claim
        return False
    finally:
        if not moved:
            remove(claim)


def touch_lease(location: StrPath, data: bytes) -> bool:
    """Change the `beat` of a lease file, if its content is `data`; return whether it is. Raises OSError."""
    if is_bucket(location):
        url = os.fspath(location)
        lease, generation = _read_object(url)
        return lease is not None and lease.data == data and _write_object(url, data, generation)
    lease = read_lease(location)
    if lease is None or lease.data != data:
        return False
    os.utime(local_path(location), follow_symlinks=False)
    return True


def _read_object(url: str) -> tuple[LeaseFile | None, bytes]:
    """Return the content of a lease in a bucket and its generation."""
    data, generation = buckets().read(url)
    if data is None:
        return None, generation
    content, newline, beat = data.partition(b"\n")
    return LeaseFile(content + newline, int.from_bytes(beat[:16], "big")), generation


def _write_object(url: str, data: bytes, generation: bytes) -> bool:
    """Write a lease in a bucket whose object has this generation; return False if it has another."""
    beat = secrets.token_hex(8).encode()
    if buckets().write(url, data + beat, generation):
        return True
    # After a retry, the write that came through looks as refused as that of another process.
    return buckets().read(url).data == data + beat


def _claim(path: str, data: bytes) -> str:
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    return join(parent(path), f".{name(path).lstrip('.')}.{digest}.tmp")
