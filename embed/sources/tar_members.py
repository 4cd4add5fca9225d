"""Walk the members of a tar file up to its last byte."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Generator, Iterator
from typing import IO, NamedTuple

_BLOCK = 512  # bytes
_CHUNK = 1 << 20  # bytes
_ZEROS = bytes(_CHUNK)
_MAX_HEADER = 1 << 20  # bytes of one extended header
MAX_ZEROS = 64 << 20  # bytes behind an archive that are read
_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)


class ArchiveEnd(NamedTuple):
    """The end of an archive; another one may follow in the same file, as `cat a.tar b.tar` makes it."""

    position: int  # byte behind the last member
    zeros: int  # bytes of zeros that follow, with which an archive ends


class TarDamage(NamedTuple):
    """Where a file cannot be read any further."""

    description: str


def read_members(file: IO[bytes]) -> Iterator[tarfile.TarInfo | ArchiveEnd | TarDamage]:
    """Yield the members of each archive in a file, and its end; at damage, yield `TarDamage` last.

    tarfile takes a bad header for the end of the archive, and reads nothing behind the end mark. Here everything up to
    the end of the file is a member, zeros, another archive or damage.
    """
    size, start = file.seek(0, os.SEEK_END), 0
    while start < size or not start:
        file.seek(start)
        try:
            tar = tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115  (it owns nothing: the caller closes the file)
        except _ERRORS:
            yield TarDamage("is not a tar file" if not start else _damage(start))
            return
        end, damage = yield from _read_archive(tar, start, size)
        following = _skip_zeros(file, end)
        if damage or following == end < size:
            is_other = start and end == start
            yield TarDamage(damage or (_other_data(end) if is_other else _damage(end)))
            return
        yield ArchiveEnd(end, following - end)
        if following - end > MAX_ZEROS:
            yield TarDamage(
                f"has more than 64 MiB of zeros behind its end at byte {end}: the rest of it is not read"
            )
            return
        start = following


class _Headers:
    """A file from which tarfile reads headers only, up to a maximal size."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("header too large")
        return self._file.read(size)


def _read_archive(
    tar: tarfile.TarFile, start: int, size: int
) -> Generator[tarfile.TarInfo, None, tuple[int, str]]:
    """Yield the members of one archive.

    Returns:
      The byte at which there is no header of a member, and the damage at or before it, if it is known.
    """
    at = start
    while True:
        try:
            member = tar.next()
        except _ERRORS:
            return min(at, size), _damage(at) if at < size else ""
        if member is None:
            return min(at, size), ""
        if tar.offset <= at or member.size < 0:  # read endlessly, or outside the file
            return at, _damage(at)
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        yield member
        end = tar.offset
        if member.isreg() and not member.issparse():
            end = member.offset_data + member.size
            if not end <= tar.offset < end + _BLOCK:  # an extended header contradicts the header
                return at, _damage(at)
        if end > size:
            return size, f"is cut off at byte {size}, inside {member.name!a}: the rest of it is missing"
        at = tar.offset


def _damage(position: int) -> str:
    return f"is damaged at byte {position}: the rest of it is not read"


def _other_data(position: int) -> str:
    return f"holds data that is no archive behind its end, from byte {position} on: it is not read"


def _skip_zeros(file: IO[bytes], start: int) -> int:
    """Return the start of the first block with another byte than zero; the end of the file if there is none.

    Behind `MAX_ZEROS` nothing is read, so that a file with a large hole does not take hours.
    """
    file.seek(start)
    stop = start + MAX_ZEROS
    while start <= stop and (chunk := file.read(_CHUNK)):
        if chunk != _ZEROS[: len(chunk)]:
            return start + (len(chunk) - len(chunk.lstrip(b"\0"))) // _BLOCK * _BLOCK
        start += len(chunk)
    return start
