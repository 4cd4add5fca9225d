"""Reads webdataset tars as img2dataset and CLIP_benchmark write them, without unpacking anything.

A row is all members with one key: the path up to the first dot of the file name. `.jpg`, `.jpeg`, `.png`
and `.webp` are the image, `.txt` and `.json` hold captions, `.cls` a class number. What cannot become a
row is left out with a reason, never silently.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_fast.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
TEXTS = (".txt", ".json", ".cls")
MAX_TEXT = 1 << 20
MAX_IMAGE = 256 << 20

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SPLITS = {"train", "test", "val", "valid", "validation", "dev"}


@dataclass
class Sample:
    """The members of one key while a tar is read."""

    key: str
    offset: int = -1  # of the image
    size: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)  # suffix -> content
    problem: str = ""  # why it cannot become a row


@dataclass(frozen=True)
class Found:
    """What one tar holds: `(key, offset, size, captions, label)` per row, and what was left out."""

    rows: list[tuple[str, int, int, tuple[str, ...], int]]
    left_out: list[tuple[str, str]]  # (key, reason)
    damage: str = ""  # "", or where the rest of the file could not be read


def expand(patterns: list[str]) -> list[Path]:
    """The tar files that SOURCE arguments mean: absolute, naturally sorted, each once.

    An argument is a file, a directory (its `*.tar`, else those of its subdirectories) or a pattern with
    `*`, `?`, `[..]`, `{00000..00005}`, `{a,b}`.

    Raises:
      UserError: an argument matches nothing, a member of braces is missing, or it is a URL.
    """
    files: set[Path] = set()
    for pattern in patterns:
        if re.match(r"pipe:|[a-z][a-z0-9+.-]*://", pattern) and not os.path.exists(pattern):
            raise UserError(f"source {pattern}: only local paths are read; copy or mount it first")
        for plain in [pattern] if os.path.exists(pattern) else _braces(pattern):
            files.update(Path(os.path.abspath(f)) for f in _matches(plain, pattern))
    return sorted(files, key=natural)


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which `2.tar` comes before `10.tar`."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(p), p) if p.isascii() and p.isdigit() else (0, 0, p) for p in parts]


def _matches(plain: str, pattern: str) -> list[str]:
    if os.path.isdir(plain):
        return _in_directory(plain)
    if os.path.exists(plain):
        return [plain]
    found = [f for f in glob.glob(plain, recursive=True) if os.path.isfile(f)]
    if not found:
        where = "" if plain == pattern else f" (from {pattern})"
        hint = "matches no file" if glob.has_magic(plain) else "does not exist"
        raise UserError(f"source {plain}{where} {hint}; give tar files, a pattern or a directory of tars")
    return found


def _in_directory(directory: str) -> list[str]:
    escaped = glob.escape(directory)
    found = list(filter(os.path.isfile, glob.glob(os.path.join(escaped, "*.tar"))))
    if found:
        return found
    found = list(filter(os.path.isfile, glob.glob(os.path.join(escaped, "*", "*.tar"))))
    if not found:
        raise UserError(f"source {directory}: there is no .tar in this directory or one level below")
    folders = {os.path.basename(os.path.dirname(f)) for f in found}
    if len(folders & _SPLITS) > 1:
        raise UserError(f"source {directory} holds the splits {', '.join(sorted(folders))}; name one of them")
    return found


def _braces(pattern: str) -> list[str]:
    """Expand the first `{a,b}` or `{00..12}`, then the rest; braces without either stay as they are."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        body = match[1]
        if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", body):
            first, last = int(bounds[1]), int(bounds[2])
            if not 0 <= last - first < 1_000_000:
                raise UserError(f"source {pattern}: {{{body}}} is not a range of up to a million numbers")
            width = len(bounds[1]) if bounds[1].startswith("0") else 0
            choices = [f"{n:0{width}d}" for n in range(first, last + 1)]
        elif "," in body:
            choices = body.split(",")
        else:
            continue
        before, after = pattern[: match.start()], pattern[match.end() :]
        return [full for choice in choices for full in _braces(f"{before}{choice}{after}")]
    return [pattern]


def read_tar(path: Path, *, lines: bool = False) -> Found:
    """All rows of a tar, in the order in which their keys first appear.

    With `lines`, each line of a `.txt` is a caption (CLIP_benchmark's retrieval sets).

    Raises:
      UserError: the tar is compressed, or cannot be opened.
    """
    samples: dict[str, Sample] = {}
    left_out: list[tuple[str, str]] = []
    damage = ""
    last = ""
    try:
        with open(path, "rb") as file:
            _refuse_compressed(path, file.read(6))
            size = os.fstat(file.fileno()).st_size
            for step in _members(file, size):
                if isinstance(step, str):
                    damage = f"{path} {step}"
                    if last in samples:
                        # Part of it may lie in what could not be read.
                        samples[last].problem = "cut off by damage of the tar"
                    break
                last = _add_member(samples, left_out, step, file) or last
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    rows = []
    for sample in samples.values():
        if sample.problem:
            left_out.append((sample.key, sample.problem))
            continue
        captions, label, problem = _texts(sample, lines)
        if problem:
            left_out.append((sample.key, problem))
        else:
            rows.append((sample.key, sample.offset, sample.size, captions, label))
    return Found(rows, left_out, damage)


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed with {name}; decompress it first, since images are read by their "
                f"place in the tar"
            )


def _members(file: Any, size: int) -> Iterator[tarfile.TarInfo | str]:
    """The members of an open tar; then, if it ends in damage, one text that says where.

    tarfile takes a bad header in mid-file for the end of the archive, so where it stopped is looked at.
    """
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (it owns nothing: the caller closes the file)
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
    samples: dict[str, Sample],
    left_out: list[tuple[str, str]],
    member: tarfile.TarInfo,
    file: Any,
) -> str:
    """Put one member into its sample; the sample's key, or "" if the member belongs to none."""
    folder, _, name = member.name.rpartition("/")
    stem, dot, rest = name.partition(".")
    if not stem or not dot or member.isdir():
        return ""
    key = f"{folder}/{stem}" if folder else stem
    suffix = f".{rest.lower()}"
    if suffix not in IMAGES and suffix not in TEXTS:
        return ""
    sample = samples.get(key) or samples.setdefault(key, Sample(key))
    if not member.isreg() or member.issparse():
        sample.problem = sample.problem or "not a regular file (a link or the like)"
    elif suffix in IMAGES:
        _add_image(sample, left_out, member)
    elif suffix not in sample.texts:
        if member.size > MAX_TEXT:
            sample.problem = sample.problem or f"{suffix} above 1 MiB"
        else:
            sample.texts[suffix] = os.pread(file.fileno(), member.size, member.offset_data)
    return key


def _add_image(sample: Sample, left_out: list[tuple[str, str]], member: tarfile.TarInfo) -> None:
    if sample.offset >= 0:
        left_out.append((sample.key, "duplicate key"))
        return
    sample.offset, sample.size = member.offset_data, member.size
    if member.size == 0:
        sample.problem = sample.problem or "empty image file"
    elif member.size > MAX_IMAGE:
        sample.problem = sample.problem or "image file above 256 MiB"
    elif not _is_text(sample.key):
        sample.problem = sample.problem or "file name is not UTF-8"


def _texts(sample: Sample, lines: bool) -> tuple[tuple[str, ...], int, str]:
    """Captions, label (-1 = none) and the reason why the sample cannot become a row ("" = it can)."""
    if sample.offset < 0:
        return (), -1, "no image (.jpg, .jpeg, .png or .webp)"
    label = -1
    if ".cls" in sample.texts:
        digits = sample.texts[".cls"].strip()
        if not re.fullmatch(rb"[0-9]{1,9}", digits):
            return (), -1, "label is not a number from 0 on"
        label = int(digits)
    captions = _json_captions(sample.texts[".json"]) if ".json" in sample.texts else []
    if not captions and ".txt" in sample.texts:
        try:
            text = sample.texts[".txt"].decode("utf-8-sig")
        except UnicodeDecodeError:
            return (), -1, "caption is not UTF-8"
        captions = text.splitlines() if lines else [text]
    captions = [c for c in dict.fromkeys(c.strip() for c in captions) if c]
    if not all(map(_is_text, captions)):
        return (), -1, "caption is not UTF-8"
    if not captions and label < 0:
        return (), -1, "no caption and no label"
    return tuple(captions), label, ""


def _json_captions(data: bytes) -> list[str]:
    """`captions` (a list) if there is one, else `caption` (a string or a list); [] if it does not parse."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict):
        return []
    for name in ("captions", "caption"):
        found = value.get(name)
        texts = found if isinstance(found, list) else [found]
        captions = [t for t in texts if isinstance(t, str) and t.strip()]
        if captions:
            return captions
    return []


def _is_text(text: str) -> bool:
    """False for lone surrogates, which tar names and JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
