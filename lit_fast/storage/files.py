"""Read, write, list and delete files at local paths and in buckets; read files at other URLs.

Every location is a `str`, a path or a URL. All file access outside this package goes through these functions. Those
that write refuse URLs that are not in a bucket; those for libraries that open files themselves refuse all URLs.

Writes are atomic: a reader, or a machine that lost power, finds all of the data or none.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple, TypeVar

from lit_fast.errors import UserError, unreadable
from lit_fast.storage import remote
from lit_fast.storage.paths import StrPath, absolute, is_bucket, is_url, join, parent, refuse_url

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


def copy_files(source: StrPath, names: Sequence[str], target: StrPath) -> None:
    """Copy files between local directories and buckets, several at a time, under the same relative names."""
    in_threads(lambda name: write_atomic(join(target, name), read_bytes(join(source, name))), names)


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
    """Open a local file for appending bytes, unbuffered; `sync` makes the written bytes durable."""
    return open(local_path(location), "a+b", buffering=0)


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


def link_or_copy(source: StrPath, target: StrPath) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no hard links; raises OSError."""
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


def version(location: StrPath) -> bytes | None:
    """Return bytes that change when a file is replaced by another one; None where there is none. Raises OSError."""
    if is_bucket(location):
        generation: bytes = buckets().generation(os.fspath(location))
        return None if generation == buckets().ABSENT else generation
    try:
        return hashlib.blake2b(read_bytes(location)).digest()
    except FileNotFoundError:
        return None


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


def sha256(location: StrPath) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    return digest(location, "sha256")


def digest(location: StrPath, algorithm: str) -> str:
    """Return the hexadecimal digest of a file's bytes, by an algorithm of hashlib."""
    if is_bucket(location):
        return hashlib.new(algorithm, read_bytes(location)).hexdigest()
    with open(local_path(location), "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
