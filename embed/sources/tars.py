"""Read webdataset tars as img2dataset and CLIP_benchmark write them.

A row is all members with one key: the path up to the first dot of the file name. `.jpg`, `.jpeg`, `.png`
and `.webp` are the image, `.txt` and `.json` hold captions, `.cls` a class number.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from lit_fast.data.images.decode import MAX_IMAGE
from lit_fast.data.images.fingerprint import HEAD, image_checksum
from lit_fast.embed.sources.clip_benchmark import lines_near
from lit_fast.embed.sources.columns import choose_columns, parse_key, parse_row
from lit_fast.embed.sources.interface import (
    IMAGE_SUFFIXES,
    Columns,
    Damage,
    Item,
    Layout,
    Skipped,
    is_utf8,
)
from lit_fast.errors import UserError
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import parent

_TEXT_SUFFIXES = (".txt", ".json", ".cls")
_MAX_TEXT = 1 << 20  # bytes of one member
_MAX_HEADER = 1 << 20  # bytes of one extended header

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)


@dataclass
class _Members:
    """The members of one key."""

    key: str
    offset: int = -1  # of the image
    size: int = 0
    check: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)  # suffix -> content
    problem: str = ""  # why this cannot be a row


def read_tar(path: str, options: Columns) -> Iterator[Item]:
    """Yield all rows of a tar, in the order in which their keys first appear.

    `options` name keys of the `.json`, `txt`, `cls` or, for the image, a suffix. Beside a `dataset_type.txt` that says
    `retrieval`, as in CLIP_benchmark's sets, each line of a `.txt` is a caption.

    Raises:
      UserError: the tar is compressed, cannot be opened, or no row has a named key.
    """
    yield Layout("tar")
    rows: dict[str, _Members] = {}
    images = (f".{options.image.lower().lstrip('.')}",) if options.image else IMAGE_SUFFIXES
    last_key = ""
    try:
        with open_read(path) as file:
            _refuse_compressed(path, file.read(6))
            size = file.seek(0, os.SEEK_END)
            for member in _members(file, size):
                if isinstance(member, str):
                    yield Damage(f"{path} {member}")
                    if last_key in rows:
                        # More of its members may be in the damaged part.
                        rows[last_key].problem = "cut off by damage of the tar"
                    break
                key, is_repeat = _add_member(rows, member, file, images)
                if is_repeat:
                    yield Skipped(key, "duplicate key")
                last_key = key or last_key
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    yield from _samples(path, rows, options, images)


def _samples(
    path: str, rows: dict[str, _Members], options: Columns, images: tuple[str, ...]
) -> Iterator[Item]:
    lines = lines_near(parent(path), "dataset_type.txt") == ("retrieval",)
    named = bool(options.names())
    names: dict[str, None] = {}  # of all rows, in order
    suffixes = ".jpg, .jpeg, .png, .webp, .gif or .bmp" if images is IMAGE_SUFFIXES else images[0]
    for members in rows.values():
        problem = members.problem or ("" if members.offset >= 0 else f"no image ({suffixes})")
        if problem:
            yield Skipped(members.key, problem)
            continue
        values = _values(members, lines)
        if named:
            names |= dict.fromkeys(values)
        row = parse_row(values, _columns(values, options))
        key = members.key
        if options.key and not row.problem:
            key, problem = parse_key(values.get(options.key))
        yield row.item(key, members.offset, members.size, problem, members.key, members.check)
    if names:
        choose_columns(options, list(names), path, image=False)  # refuses a name that no row has


def _values(members: _Members, lines: bool) -> dict[str, Any]:
    """Return the fields of the `.json`, and the other members as `txt` and `cls`."""
    values: dict[str, Any] = {}
    if ".json" in members.texts:
        try:
            value = json.loads(members.texts[".json"])
        except (ValueError, RecursionError):
            value = None
        values = value if isinstance(value, dict) else {}
    if ".txt" in members.texts:
        text = members.texts[".txt"].removeprefix(b"\xef\xbb\xbf")
        values["txt"] = text.splitlines() if lines else text
    if ".cls" in members.texts:
        values["cls"] = members.texts[".cls"]
    return values


def _columns(values: dict[str, Any], options: Columns) -> Columns:
    """Return the named columns.

    By default these are the first of `captions`, `caption` and `txt` with a text, and `cls`.
    """
    captions = options.captions
    if not captions:
        for name in ("captions", "caption", "txt"):
            found = values.get(name)
            parts = found if isinstance(found, list) else [found]
            if any(isinstance(part, str | bytes) and part.strip() for part in parts):
                captions = (("", name),)
                break
    label = options.label or ("cls" if "cls" in values else "")
    return replace(options, captions=captions, label=label)


def _refuse_compressed(path: str, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {name}, where images cannot be read by their offset; decompress it"
            )


class _Headers:
    """A file from which tarfile reads headers only, up to a maximal size."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("header too large")
        return self._file.read(size)


def _members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo | str]:
    """Yield the members of an open tar, then a description of the damage, if any.

    tarfile takes a bad header in mid-file for the end of the archive, so the position where it stopped is checked.
    """
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115  (it owns nothing: the caller closes the file)
    except _TAR_ERRORS:
        yield "is not a tar file"
        return
    end = -1
    while True:
        try:
            member = tar.next()
        except (*_TAR_ERRORS, OSError):
            break
        if member is None or member.offset <= end or member.size < 0:
            break  # a header that points backwards would be read endlessly
        end = member.offset
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        yield member
        if member.offset_data + member.size > size:
            yield f"is cut off at byte {size}, inside {member.name!a}: the rest of it is missing"
            return
    stopped = tar.offset
    file.seek(min(max(stopped, 0), size))
    if file.read(512).strip(b"\0"):
        yield f"is damaged at byte {stopped}: the rest of it is not read"


def _add_member(
    rows: dict[str, _Members], member: tarfile.TarInfo, file: IO[bytes], images: tuple[str, ...]
) -> tuple[str, bool]:
    """Add one member to its row.

    Returns:
      The row's key ("" = the member is ignored), and whether the row had an image already.
    """
    folder, _, name = member.name.rpartition("/")
    stem, dot, rest = name.partition(".")
    if not stem or not dot or member.isdir():
        return "", False
    key = f"{folder}/{stem}" if folder else stem
    suffix = f".{rest.lower()}"
    if suffix not in images and suffix not in _TEXT_SUFFIXES:
        return "", False
    row = rows.get(key) or rows.setdefault(key, _Members(key))
    problem = ""
    if not member.isreg() or member.issparse():
        problem = "not a regular file (a link or the like)"
    elif suffix in images:
        if row.offset >= 0:
            return key, True
        row.offset, row.size = member.offset_data, member.size
        file.seek(member.offset_data)  # the buffer has these bytes: they follow the header
        row.check = image_checksum(file.read(min(member.size, HEAD)))
        if member.size == 0:
            problem = "empty image file"
        elif member.size > MAX_IMAGE:
            problem = "image file above 256 MiB"
        elif not is_utf8(key):
            problem = "file name is not UTF-8"
    elif suffix not in row.texts:
        if member.size > _MAX_TEXT:
            problem = f"{suffix} above 1 MiB"
        else:
            file.seek(member.offset_data)
            row.texts[suffix] = file.read(member.size)
    row.problem = row.problem or problem
    return key, False
