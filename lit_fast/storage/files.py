"""Read, list, move and delete files at local paths and in buckets; read files at other URLs.

Every location is a `str`, a path or a URL. All file access outside this package goes through these functions and those
of `lit_fast.storage.atomic`. Functions that write refuse URLs that are not in a bucket; those for libraries that open
files themselves refuse all URLs.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, NamedTuple, TypeVar

from lit_fast.errors import UserError, unreadable
from lit_fast.storage import remote
from lit_fast.storage.paths import StrPath, is_bucket, is_url, join, refuse_url

_OPEN_FILES = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")

T = TypeVar("T")
R = TypeVar("R")


def local_path(location: StrPath) -> str:
    """Return the path of a local file or directory, for libraries that open files themselves.

    Raises:
      UserError: the location is a URL, which would otherwise become a directory of that name.
    """
    location = os.fspath(location)
    if ":" in location:
        refuse_url(location)
    return location


def buckets() -> Any:
    """Return the module, which imports TensorStore: not needed for local files."""
    from lit_fast.storage import buckets as module

    return module


def in_threads(work: Callable[[T], R], items: Sequence[T], threads: int = 16) -> list[R]:
    """Return `work(item)` for each item, computed in threads, which wait for requests or a disk."""
    with ThreadPoolExecutor(threads, "storage") as pool:
        return list(pool.map(work, items))


def exists(location: StrPath) -> bool:
    """Return whether there is a file or directory."""
    if is_bucket(location):
        return is_file(location) or is_directory(location)
    return os.path.exists(local_path(location))


def is_file(location: StrPath) -> bool:
    """Return whether there is a regular file."""
    if is_bucket(location):
        return buckets().generation(os.fspath(location)) != buckets().ABSENT
    return os.path.isfile(local_path(location))


def is_stream(location: StrPath) -> bool:
    """Return whether this is a device, a pipe or a name of an open file, as /dev/null and /dev/stdout are."""
    if is_bucket(location):
        return False
    path = local_path(location)
    return path.startswith(_OPEN_FILES) or (
        os.path.exists(path) and not is_file(path) and not is_directory(path)
    )


def is_directory(location: StrPath) -> bool:
    """Return whether there is a directory; in a bucket, an object below the location."""
    if is_bucket(location):
        return bool(buckets().names_below(os.fspath(location)))
    return os.path.isdir(local_path(location))


def size(location: StrPath) -> int:
    """Return the bytes of a file; raises OSError where there is none."""
    if is_bucket(location):
        return remote.stat(os.fspath(location))[0]
    return os.path.getsize(local_path(location))


def directory_size(location: StrPath) -> int:
    """Return the bytes of all files below a directory; files that vanish meanwhile do not count."""
    total = 0
    if is_bucket(location):
        return remote.directory_size(os.fspath(location))
    for directory, _, names in os.walk(local_path(location)):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(join(directory, name)).st_size
    return total


def free_space(location: StrPath) -> int:
    """Return the bytes that may still be written to the file system of a directory."""
    return shutil.disk_usage(local_path(location)).free


class FileStatus(NamedTuple):
    """The size, the kind and the time of a file."""

    size: int  # bytes
    is_file: bool  # a regular file
    is_directory: bool
    modified: int  # nanoseconds since 1970


def file_status(location: StrPath) -> FileStatus:
    """Return the status of a file or directory without opening it; raises OSError where it cannot be read."""
    status = os.stat(local_path(location))
    mode = status.st_mode
    return FileStatus(status.st_size, stat.S_ISREG(mode), stat.S_ISDIR(mode), status.st_mtime_ns)


def size_and_etag(location: StrPath) -> tuple[int, str]:
    """Return the bytes and the ETag ("" for local files) of a file or URL; 0 bytes for a directory.

    Raises:
      UserError: it cannot be read, or is neither a regular file nor a directory.
    """
    location = os.fspath(location)
    if is_url(location):
        return remote.stat(location)
    try:
        status = file_status(location)
    except OSError as error:
        raise unreadable(location, error) from None
    if status.is_directory:
        return 0, ""
    if not status.is_file:  # a pipe can be read once and only in order
        raise UserError(f"{location} is not a regular file; write its content to a file first")
    return status.size, ""


def check_readable(url: StrPath) -> None:
    """Raise UserError if files of the protocol of a URL cannot be read; no request is made to most servers."""
    remote.check_protocol(os.fspath(url))


def file_sizes(url: StrPath) -> dict[str, int]:
    """Return the bytes of every file below a directory at a URL by relative name, sorted, from one listing.

    Raises:
      UserError: it cannot be listed.
    """
    return remote.file_sizes(os.fspath(url))


def list_names(location: StrPath) -> list[str]:
    """Return the names of the files and directories directly in a directory, sorted; [] where there is none."""
    if is_bucket(location):
        return sorted({name.partition("/")[0] for name in buckets().names_below(os.fspath(location))})
    try:
        return sorted(os.listdir(local_path(location)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def match_files(pattern: StrPath) -> list[str]:
    """Return the files that match a pattern with `*`, `**`, `?` or `[..]`, or of a URL that ends with `/`; sorted.

    Raises:
      UserError: files cannot be listed over http.
    """
    if is_url(pattern):
        return remote.listing(os.fspath(pattern))
    return sorted(f for f in glob.glob(local_path(pattern), recursive=True) if os.path.isfile(f))


def _names_below(url: StrPath) -> list[str]:
    return buckets().names_below(os.fspath(url)) if is_bucket(url) else list(file_sizes(url))


def list_directories(location: StrPath) -> list[str]:
    """Return the names of the directories directly in a directory, sorted; raises OSError where there is none."""
    if is_url(location):
        return sorted({name.partition("/")[0] for name in _names_below(location) if "/" in name})
    with os.scandir(local_path(location)) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def walk_files(location: StrPath) -> Iterator[str]:
    """Yield the relative paths of all files below a directory, sorted.

    Links to directories are not followed but yielded.

    Raises:
      OSError: a directory cannot be read.
    """
    for directory, names in walk_directories(location):
        yield from (join(directory, name) for name in names)


def walk_directories(location: StrPath) -> Iterator[tuple[str, list[str]]]:
    """Yield the relative path of a directory and of each below it, "" first, with the sorted names of its files.

    Links to directories are not followed but are among the names.

    Raises:
      OSError: a directory cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    if is_url(location):
        found: dict[str, list[str]] = {"": []}
        for name in _names_below(location):
            directory, _, file = name.rpartition("/")
            found.setdefault(directory, []).append(file)
        yield from found.items()
        return
    root = local_path(location)
    for directory, folders, names in os.walk(root, onerror=refuse):
        folders.sort()
        links = [folder for folder in folders if os.path.islink(os.path.join(directory, folder))]
        relative = os.path.relpath(directory, root)
        yield "" if relative == "." else relative, sorted([*names, *links])


def make_directory(location: StrPath) -> None:
    """Create a directory and those above it, unless it exists; buckets have none."""
    if is_bucket(location):
        return
    os.makedirs(local_path(location) or ".", exist_ok=True)


def rename(source: StrPath, target: StrPath) -> None:
    """Move a file or directory within a file system; raises OSError."""
    os.replace(local_path(source), local_path(target))


def remove(location: StrPath) -> None:
    """Delete a file, if it is there."""
    if is_bucket(location):
        buckets().delete(os.fspath(location))
        return
    with suppress(FileNotFoundError):
        os.unlink(local_path(location))


def remove_tree(location: StrPath) -> None:
    """Delete a directory with everything below it, if it is there."""
    if is_bucket(location):
        buckets().delete_below(os.fspath(location))
        return
    with suppress(FileNotFoundError):
        shutil.rmtree(local_path(location))


def open_read(location: StrPath) -> io.BufferedReader:
    """Open a file or URL for reading bytes at any position.

    Raises:
      UserError: it is absent or cannot be read.
    """
    location = os.fspath(location)
    if is_url(location):
        return remote.open_remote(location)
    try:
        return open(location, "rb")
    except OSError as error:
        raise unreadable(location, error) from None


def open_append(location: StrPath) -> IO[bytes]:
    """Open a local file for appending bytes, unbuffered; `lit_fast.storage.atomic.sync` flushes it."""
    return open(local_path(location), "a+b", buffering=0)


def read_bytes(location: StrPath) -> bytes:
    """Return the content of a file; raises OSError."""
    if is_bucket(location):
        data = buckets().read(os.fspath(location)).data
        if data is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location)
        return data
    with open(local_path(location), "rb") as file:
        return file.read()


def read_range(location: StrPath, start: int, stop: int) -> bytes:
    """Return the bytes from `start` to `stop` of a file or URL, fewer where a local file ends earlier.

    Raises:
      OSError: a local file cannot be read.
      UserError: a URL cannot be read, or its file ends earlier.
    """
    if is_url(location):
        return remote.read_range(os.fspath(location), start, stop - start)
    with open(local_path(location), "rb", buffering=0) as file:
        file.seek(start)
        parts = []
        while start < stop and (part := file.read(stop - start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)


def read_tail(location: StrPath, count: int) -> bytes:
    """Return the last `count` bytes of a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is shorter.
    """
    if is_bucket(location):
        return buckets().read_range(os.fspath(location), -count, None)
    end = size(location)
    if end < count:
        raise ValueError(f"{location} has only {end} bytes")
    return read_range(location, end - count, end)


def read_whole(location: StrPath, limit: int) -> bytes | None:
    """Return the content of a file or URL; None where there is none.

    Raises:
      UserError: it has more than `limit` bytes, or cannot be read.
    """
    location = os.fspath(location)
    if is_url(location):
        return remote.read_whole(location, limit)
    if not is_file(location):
        return None
    with open_read(location) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{location} has more than {limit:,} bytes; give a smaller file")
    return data


def read_into(location: StrPath, start: int, *buffers: memoryview) -> None:
    """Fill writable buffers of bytes, one after the other, with the bytes of a file from `start` on.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file ends earlier.
    """
    if is_bucket(location):
        data = memoryview(buckets().read_range(os.fspath(location), start, start + sum(map(len, buffers))))
        for buffer in buffers:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]
        return
    with open(local_path(location), "rb", buffering=0) as file:
        file.seek(start)
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise ValueError(f"{location} ends early")
                done += count


def sha256(location: StrPath) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    return digest(location, "sha256")


def digest(location: StrPath, algorithm: str) -> str:
    """Return the hexadecimal digest of a file's bytes, by an algorithm of hashlib."""
    if is_bucket(location):
        return hashlib.new(algorithm, read_bytes(location)).hexdigest()
    with open(local_path(location), "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
