"""Write, copy and flush files and directories, at local paths and in buckets.

`write_atomic`, `replacing` and `replacing_directory` are atomic: a reader, or a machine that lost power, finds all of
the data or none.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from lit_fast.storage.files import (
    buckets,
    in_threads,
    is_stream,
    list_names,
    local_path,
    make_directory,
    read_bytes,
    remove,
    remove_tree,
    walk_files,
)
from lit_fast.storage.paths import StrPath, absolute, is_bucket, join, parent


def write_atomic(location: StrPath, data: bytes) -> None:
    """Write a file so that a reader finds all of `data` or none of it; creates the directories above.

    A device or a pipe receives the data instead of being replaced by a file.
    """
    if is_bucket(location):
        buckets().write(os.fspath(location), data)
        return
    if is_stream(location):
        path = local_path(location)
        with _named(path), open(path, "ab") as stream:
            stream.write(data)
        return
    with replacing(location) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_if_unchanged(location: StrPath, data: bytes, expect: bytes | None) -> bool:
    """Write a file that still has the version `expect`; return False if it has another one.

    In a bucket the comparison and the write are one step; at a local path the caller holds a lock.
    """
    if not is_bucket(location):
        if version(location) != expect:
            return False
        write_atomic(location, data)
        return True
    url = os.fspath(location)
    # After a retry, the write that came through looks as refused as that of another process.
    expect = buckets().ABSENT if expect is None else expect
    return bool(buckets().write(url, data, expect) or buckets().read(url).data == data)


def version(location: StrPath) -> bytes | None:
    """Return bytes that change when a file is replaced by another one; None where there is none. Raises OSError."""
    if is_bucket(location):
        generation: bytes = buckets().generation(os.fspath(location))
        return None if generation == buckets().ABSENT else generation
    try:
        return hashlib.blake2b(read_bytes(location)).digest()
    except FileNotFoundError:
        return None


@contextmanager
def replacing(location: StrPath) -> Iterator[str]:
    """Yield the path of a temporary file beside `location`, which it replaces, flushed, at the end of the block.

    For libraries that write files themselves. After an exception the temporary file is deleted. For a location in a
    bucket the temporary file is local, and is uploaded.
    """
    if is_bucket(location):
        with tempfile.TemporaryDirectory(prefix="lit_fast.") as directory:
            temporary = join(directory, os.path.basename(os.fspath(location)))
            yield temporary
            buckets().write(os.fspath(location), read_bytes(temporary))
        return
    path = local_path(location)
    make_directory(parent(path))
    temporary = join(parent(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        with _named(path):
            yield temporary
            sync_path(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a directory that became read-only; the first error counts
            remove(temporary)
    sync_path(parent(path))


def remove_temporary_files(directory: StrPath) -> None:
    """Delete what `replacing` left in a directory when its process was killed.

    No other process may be writing there. The files with which processes compete for a lease are kept.
    """
    if is_bucket(directory):
        return
    for file in list_names(directory):
        if re.fullmatch(r"\..+\.\d+\.tmp", file) and not file.startswith(".lock."):
            remove(join(directory, file))


@contextmanager
def replacing_directory(location: StrPath, last: Collection[str] = ()) -> Iterator[str]:
    """Yield the path of a temporary directory beside `location`, which it becomes, flushed, at the end of the block.

    `location` is absent or an empty directory. All files get the permissions of new files, whichever the library
    that wrote them chose. After an exception the temporary directory is deleted. For a location in a bucket the
    temporary directory is local, and its files are uploaded.

    Args:
      location: the directory.
      last: names of the files without which the directory is not complete; they are uploaded after all others.
    """
    if is_bucket(location):
        with tempfile.TemporaryDirectory(prefix="lit_fast.") as temporary:
            yield temporary
            names = list(walk_files(temporary))
            copy_files(temporary, [name for name in names if name not in last], location)
            copy_files(temporary, [name for name in names if name in last], location)
        return
    path = absolute(local_path(location))
    make_directory(parent(path))
    temporary = join(parent(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
    remove_tree(temporary)
    os.mkdir(temporary)
    try:
        with _named(path):
            yield temporary
        mode = os.stat(temporary).st_mode & 0o666
        for directory, _, names in os.walk(temporary):
            for file in (join(directory, name) for name in names):
                os.chmod(file, mode)
                sync_path(file)
            sync_path(directory)
        os.replace(temporary, path)
    finally:
        remove_tree(temporary)
    sync_path(parent(path))


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Give the errors of the operating system that name no file, those of writing, the name of a file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, path) from None
        raise


def sync(file: IO[bytes]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(location: StrPath) -> None:
    """Flush a file that another library wrote, or the entries of a directory, to the disk."""
    descriptor = os.open(local_path(location), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: StrPath, target: StrPath) -> None:
    """Make `target` the same file as `source`, or a copy, not atomic, where there are no hard links; raises OSError."""
    if is_bucket(source) and is_bucket(target):
        write_atomic(target, read_bytes(source))
        return
    try:
        os.link(local_path(source), local_path(target))
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(local_path(source), local_path(target))
        sync_path(target)


def copy_files(source: StrPath, names: Sequence[str], target: StrPath) -> None:
    """Copy files between local directories and buckets, several at a time, under the same relative names."""
    in_threads(lambda name: write_atomic(join(target, name), read_bytes(join(source, name))), names)
