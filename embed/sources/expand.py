"""Which files the SOURCE arguments of `lit-fast index` mean, and of what format each is."""

from __future__ import annotations

import glob
import itertools
import os
import re

from lit_fast.data.images.noise import is_noise
from lit_fast.embed.sources.benchmark import PREFIX, benchmark_tars, hub_tars
from lit_fast.embed.sources.items import IMAGE_SUFFIXES
from lit_fast.errors import UserError
from lit_fast.storage import remote

_FORMATS = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "table",
    ".tsv": "table",
    ".jsonl": "table",
    ".ndjson": "table",
    ".json": "coco",
    ".array_record": "array_record",
}
_SPLITS = {"train", "test", "val", "valid", "validation", "dev"}


def expand(patterns: list[str]) -> list[str]:
    """The files that SOURCE arguments mean: absolute or URLs, naturally sorted, each once.

    An argument is a file, a directory (see `_in_directory`), a pattern with `*`, `?`, `[..]`, `{00000..00005}`,
    `{a,b}`, or one of CLIP_benchmark's sets: a directory or URL of its layout, or `wds:NAME`. A directory of
    folders of images is one source by itself.

    Raises:
      UserError: an argument matches nothing, a member of braces is missing, or a directory is ambiguous.
    """
    files: set[str] = set()
    for pattern in patterns:
        if is_noise(pattern) and not os.path.exists(pattern):
            files.add(pattern)
            continue
        if pattern.startswith("pipe:") and not os.path.exists(pattern):
            raise UserError(f"source {pattern}: commands are not run; give files or URLs")
        if pattern.startswith(PREFIX) and not os.path.exists(pattern):
            files.update(hub_tars(pattern))
            continue
        for plain in [pattern] if os.path.exists(pattern) else _braces(pattern):
            if remote.is_remote(plain) and not os.path.exists(plain):
                files.update(_remote(plain, pattern))
            else:
                files.update(os.path.abspath(f) for f in _local(plain, pattern))
    return sorted(files, key=natural)


def natural(path: str) -> list[tuple[int, int, str]]:
    """Sort key in which `2.tar` comes before `10.tar`."""
    parts = re.split(r"(\d+)", path)
    return [(1, int(p), p) if p.isascii() and p.isdigit() and len(p) < 100 else (0, 0, p) for p in parts]


def format_of(path: str) -> str:
    """noise, tar, parquet, table, coco, array_record or folder: by the suffix, else by the first bytes.

    What is nothing known is taken for a tar, whose reader says so.
    """
    if is_noise(path):
        return "noise"
    if not remote.is_remote(path) and os.path.isdir(path):
        return "folder"
    name = os.path.basename(path.partition("?")[0] if remote.is_remote(path) else path).lower()
    if by_name := _by_name(name):
        return by_name
    if not remote.is_remote(path):
        try:
            with open(path, "rb") as file:
                start = file.read(4)
        except OSError:
            return "tar"
        if start == b"PAR1":
            return "parquet"
    return "tar"


def _by_name(name: str) -> str:
    if re.search(r"\.array_record(-\d+-of-\d+)?$", name):  # TFDS: name-train.array_record-00000-of-00004
        return "array_record"
    return _FORMATS.get(os.path.splitext(name)[1], "")


def _local(plain: str, pattern: str) -> list[str]:
    if os.path.isdir(plain):
        return benchmark_tars(plain) or _in_directory(plain)
    if os.path.exists(plain):
        return [plain]
    found = [f for f in glob.glob(plain, recursive=True) if os.path.isfile(f)]
    if not found:
        where = "" if plain == pattern else f" (from {pattern})"
        hint = "matches no file" if glob.has_magic(plain) else "does not exist"
        raise UserError(f"source {plain}{where} {hint}; give files, a pattern or a directory")
    return found


def _remote(plain: str, pattern: str) -> list[str]:
    if not plain.endswith("/") and not (glob.has_magic(plain) and not plain.startswith("http")):
        return [plain]
    if plain.endswith("/") and (tars := benchmark_tars(plain)):
        return tars
    found = remote.listing(plain)
    if plain.endswith("/"):
        found = _of_one_format(plain, found)
    if not found:
        raise UserError(
            f"source {plain} (from {pattern}) matches no file; give files, a pattern or a directory"
        )
    return found


def _in_directory(directory: str) -> list[str]:
    """The files of the one format in a directory, else in its subdirectories, else the directory itself.

    COCO's `.json` must be named, since many things are called so.

    Raises:
      UserError: several formats or several splits lie there, or nothing that can be read.
    """
    escaped = glob.escape(directory)
    for depth in (["*"], ["*", "*"]):
        below = glob.iglob(os.path.join(escaped, *depth))
        found = _of_one_format(
            directory, [f for f in below if _by_name(os.path.basename(f).lower()) and os.path.isfile(f)]
        )
        folders = {os.path.basename(os.path.dirname(f)) for f in found}
        if len(depth) == 2 and len(folders & _SPLITS) > 1:
            raise UserError(
                f"source {directory} holds the splits {', '.join(sorted(folders))}; name one of them"
            )
        if found:
            return found
    subdirectories = sorted(e.name for e in os.scandir(directory) if e.is_dir())
    if len(set(subdirectories) & _SPLITS) > 1:
        raise UserError(f"source {directory} holds the splits {', '.join(subdirectories)}; name one of them")
    if any(_has_images(os.path.join(directory, name)) for name in itertools.islice(subdirectories, 100)):
        return [directory]
    raise UserError(
        f"source {directory}: there is no .tar, .parquet, .csv, .tsv, .jsonl or .array_record in this directory or "
        f"one level below, and no folder of images per class"
    )


def _of_one_format(directory: str, found: list[str]) -> list[str]:
    files: dict[str, list[str]] = {}
    for file in found:
        files.setdefault(_by_name(os.path.basename(file).lower()), []).append(file)
    files.pop("", None)
    files.pop("coco", None)
    stems = {os.path.splitext(f)[0] for f in files.get("tar", [])}
    if stems and all(os.path.splitext(f)[0] in stems for f in files.get("parquet", [])):
        files.pop("parquet", None)  # img2dataset's log beside each tar
    if len(files) > 1:
        kinds = " and ".join(
            sorted({os.path.splitext(f)[1] or f for group in files.values() for f in group[:1]})
        )
        raise UserError(
            f"source {directory} holds {kinds} files; name those to read, as in {directory.rstrip('/')}/*.tar"
        )
    return next(iter(files.values()), [])


def _has_images(directory: str) -> bool:
    with os.scandir(directory) as entries:
        return any(
            os.path.splitext(e.name)[1].lower() in IMAGE_SUFFIXES for e in itertools.islice(entries, 1000)
        )


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
