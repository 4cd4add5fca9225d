"""Reads webdataset tars as img2dataset and CLIP_benchmark write them, without unpacking anything.

A row is all members with one key: the path up to the first dot of the file name. `.jpg`, `.jpeg`, `.png`
and `.webp` are the image, `.txt` and `.json` hold captions, `.cls` a class number. What cannot become a
row is left out with a reason, never silently.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from lit_fast.data.images.decode import MAX_IMAGE
from lit_fast.embed.sources.fields import Fields, choose, key_text, texts
from lit_fast.embed.sources.items import IMAGE_SUFFIXES, Damage, Item, Layout, LeftOut, Names, Sample, is_text
from lit_fast.errors import UserError
from lit_fast.storage.read import open_binary

TEXTS = (".txt", ".json", ".cls")
MAX_TEXT = 1 << 20
_MAX_HEADER = 1 << 20  # bytes of one extended header

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class Members:
    """The members of one key while a tar is read."""

    key: str
    offset: int = -1  # of the image
    size: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)  # suffix -> content
    problem: str = ""  # why it cannot become a row


def read_tar(path: str, names: Names, *, lines: bool = False) -> Iterator[Item]:
    """All rows of a tar, in the order in which their keys first appear.

    With `lines`, each line of a `.txt` is a caption (CLIP_benchmark's retrieval sets). `names` are keys of
    the `.json`, `txt`, `cls` or, for the image, a suffix.

    Raises:
      UserError: the tar is compressed, cannot be opened, or no row has what `names` says.
    """
    yield Layout("tar")
    samples: dict[str, Members] = {}
    images = (f".{names.image.lower().lstrip('.')}",) if names.image else IMAGE_SUFFIXES
    last = ""
    try:
        with open_binary(path) as file:
            _refuse_compressed(path, file.read(6))
            size = file.seek(0, os.SEEK_END)
            for step in _members(file, size):
                if isinstance(step, str):
                    yield Damage(f"{path} {step}")
                    if last in samples:
                        # Part of it may lie in what could not be read.
                        samples[last].problem = "cut off by damage of the tar"
                    break
                key, twice = _add_member(samples, step, file, images)
                if twice:
                    yield LeftOut(key, "duplicate key")
                last = key or last
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    yield from _rows(path, samples, names, lines, images)


def _rows(
    path: str, samples: dict[str, Members], names: Names, lines: bool, images: tuple[str, ...]
) -> Iterator[Item]:
    wanted = {n for n in (*(n for _, n in names.captions), names.key, names.label, names.language) if n}
    seen: dict[str, None] = {}
    kinds = (
        "no image (.jpg, .jpeg, .png, .webp, .gif or .bmp)"
        if images is IMAGE_SUFFIXES
        else f"no image ({images[0]})"
    )
    for sample in samples.values():
        problem = sample.problem or ("" if sample.offset >= 0 else kinds)
        if problem:
            yield LeftOut(sample.key, problem)
            continue
        values = _values(sample, lines)
        if wanted:
            seen |= dict.fromkeys(values)
        fields = _fields(values, names)
        captions, languages, label, problem = texts(values, fields)
        key = sample.key
        if names.key and not problem:
            key, problem = key_text(values.get(names.key))
        if problem:
            yield LeftOut(key or sample.key, problem)
        else:
            yield Sample(key, sample.offset, sample.size, captions, label, languages)
    if seen:
        choose(names, list(seen), path, image=False)


def _values(sample: Members, lines: bool) -> dict[str, Any]:
    """The fields of the `.json` with the other members as `txt` and `cls`."""
    values: dict[str, Any] = {}
    if ".json" in sample.texts:
        try:
            value = json.loads(sample.texts[".json"])
        except (ValueError, RecursionError):
            value = None
        values = value if isinstance(value, dict) else {}
    if ".txt" in sample.texts:
        text = sample.texts[".txt"]
        values["txt"] = (
            text.removeprefix(b"\xef\xbb\xbf").splitlines() if lines else text.removeprefix(b"\xef\xbb\xbf")
        )
    if ".cls" in sample.texts:
        values["cls"] = sample.texts[".cls"]
    return values


def _fields(values: dict[str, Any], names: Names) -> Fields:
    """What was named; else `captions`, `caption` or the `.txt`, whichever has a text first, and the `.cls`."""
    captions = names.captions
    if not captions:
        for name in ("captions", "caption", "txt"):
            found = values.get(name)
            parts = found if isinstance(found, list) else [found]
            if any(isinstance(part, str | bytes) and part.strip() for part in parts):
                captions = (("", name),)
                break
    return Fields("", captions, names.key, names.label or ("cls" if "cls" in values else ""), names.language)


def _refuse_compressed(path: str, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {name}; decompress it first, since images are read by their "
                f"place in the tar"
            )


class _Headers:
    """A file from which tarfile reads headers only; one of absurd size is refused, not loaded."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("header too large")
        return self._file.read(size)


def _members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo | str]:
    """The members of an open tar; then, if it ends in damage, one text that says where.

    tarfile takes a bad header in mid-file for the end of the archive, so where it stopped is looked at.
    """
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115  (it owns nothing: the caller closes the file)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError):
        yield "is not a tar file"
        return
    end = -1
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError, OSError):
            break
        if member is None or member.offset <= end or member.size < 0:
            break  # a header that points backwards would be read for ever
        end = member.offset
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.offset_data + member.size > size:
            yield member
            yield f"is cut off at byte {size}, inside {member.name!a}: the rest of it is missing"
            return
        yield member
    stopped = tar.offset
    file.seek(min(max(stopped, 0), size))
    if file.read(512).strip(b"\0"):
        yield f"is damaged at byte {stopped}: the rest of it is not read"


def _add_member(
    samples: dict[str, Members], member: tarfile.TarInfo, file: IO[bytes], images: tuple[str, ...]
) -> tuple[str, bool]:
    """Put one member into its sample; the sample's key ("": none), and whether it is one image too many."""
    folder, _, name = member.name.rpartition("/")
    stem, dot, rest = name.partition(".")
    if not stem or not dot or member.isdir():
        return "", False
    key = f"{folder}/{stem}" if folder else stem
    suffix = f".{rest.lower()}"
    if suffix not in images and suffix not in TEXTS:
        return "", False
    sample = samples.get(key) or samples.setdefault(key, Members(key))
    if not member.isreg() or member.issparse():
        sample.problem = sample.problem or "not a regular file (a link or the like)"
    elif suffix in images:
        return key, _add_image(sample, member)
    elif suffix not in sample.texts:
        if member.size > MAX_TEXT:
            sample.problem = sample.problem or f"{suffix} above 1 MiB"
        else:
            file.seek(member.offset_data)
            sample.texts[suffix] = file.read(member.size)
    return key, False


def _add_image(sample: Members, member: tarfile.TarInfo) -> bool:
    if sample.offset >= 0:
        return True
    sample.offset, sample.size = member.offset_data, member.size
    if member.size == 0:
        sample.problem = sample.problem or "empty image file"
    elif member.size > MAX_IMAGE:
        sample.problem = sample.problem or "image file above 256 MiB"
    elif not is_text(sample.key):
        sample.problem = sample.problem or "file name is not UTF-8"
    return False
