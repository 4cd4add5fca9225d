"""Expand the SOURCE arguments of `lit-fast index` to files, directories and URLs."""

from __future__ import annotations

import os
import re

from lit_fast.data.images.noise import is_noise
from lit_fast.embed.sources.clip_benchmark import PREFIX, benchmark_tars, hub_tars
from lit_fast.embed.sources.formats import format_by_name
from lit_fast.embed.sources.image_folders import image_sources, refuse_several_splits
from lit_fast.embed.sources.interface import IMAGE_SUFFIXES, Columns
from lit_fast.embed.sources.pairs import has_pairs
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, is_directory, is_file, list_directories, list_names, match_files
from lit_fast.storage.paths import is_junk, is_pattern, is_url, join, name, parent, suffix
from lit_fast.utils.output import status


def expand(patterns: list[str]) -> list[str]:
    """Return the files of SOURCE arguments, naturally sorted, each once.

    They are absolute paths or URLs.

    An argument is a file, a directory (see `_in_directory`), a pattern with `*`, `?`, `[..]`, `{00000..00005}`,
    `{a,b}`, or one of CLIP_benchmark's sets: a directory or URL of its layout, or `wds:NAME`. A directory of
    folders of images is one source by itself.

    Raises:
      UserError: an argument matches nothing, a member of braces is missing, or a directory is ambiguous.
    """
    files: set[str] = set()
    for pattern in patterns:
        if not is_url(pattern) and exists(pattern):
            files.update(_local(pattern, pattern))
        elif is_noise(pattern):
            files.add(pattern)
        elif pattern.startswith("pipe:"):
            raise UserError(f"source {pattern}: commands are not run; give files or URLs")
        elif pattern.startswith(PREFIX):
            files.update(hub_tars(pattern))
        else:
            for plain in _braces(pattern):
                found = _remote if is_url(plain) else _local
                files.update(found(plain, pattern))
    return sorted(files, key=natural)


def natural(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts `2.tar` before `10.tar`."""
    parts = re.split(r"(\d+)", path)
    return [(1, int(p), p) if p.isascii() and p.isdigit() and len(p) < 100 else (0, 0, p) for p in parts]


def _local(plain: str, pattern: str) -> list[str]:
    path = os.path.abspath(plain)
    if is_directory(path):
        return _without_gaps(benchmark_tars(path) or _in_directory(path))
    found = [path] if exists(path) else _without_gaps(_matches(path))
    if not found:
        where = "" if plain == pattern else f" (from {pattern})"
        problem = "matches no file" if is_pattern(plain) else "does not exist"
        raise UserError(f"source {plain}{where} {problem}; give files, a pattern or a directory")
    return found


def _remote(plain: str, pattern: str) -> list[str]:
    if not plain.endswith("/") and not (is_pattern(plain) and not plain.startswith("http")):
        return [plain]
    if plain.endswith("/") and (tars := benchmark_tars(plain)):
        return tars
    found = _without_gaps(_matches(plain))
    if plain.endswith("/"):
        found = _of_one_format(plain, found) or image_sources(plain)
    if not found:
        raise UserError(
            f"source {plain} (from {pattern}) matches no file; give files, a pattern or a directory"
        )
    return found


def _without_gaps(files: list[str]) -> list[str]:
    """Return the files; warn of sets like `x-00000-of-00002.parquet` that lack a member."""
    sets: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-(\d{1,9})-of-(\d{1,9})(?!\d).*", name(file), re.ASCII):
            sets.setdefault((join(parent(file), match[1]), int(match[3])), set()).add(int(match[2]))
    for (start, count), numbers in sets.items():
        if len(numbers) < count:
            first = next(n for n in range(count + 1) if n not in numbers)
            missing = f"{start}-{first:05}-of-{count:05}"
            status(f"warning: {missing} is missing: {len(numbers):,} of {count:,} such files are there")
    return files


def _matches(pattern: str) -> list[str]:
    """Return the files that match a pattern, or are in a URL that ends with `/`, without junk."""
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    return [file for file in match_files(pattern) if not is_junk(file[len(fixed) + 1 :])]


def _in_directory(directory: str) -> list[str]:
    """Return the files of the one format in a directory.

    Without any, return those in its subdirectories; without any there, the directory itself if it holds images.
    A `.json` must be named, since many other files have this suffix.

    Raises:
      UserError: there are several formats or several splits, or no readable file.
    """
    subdirectories = [d for d in list_directories(directory) if not is_junk(d)]
    for folders in ([directory], [join(directory, d) for d in subdirectories]):
        files = [join(folder, file) for folder in folders for file in list_names(folder)]
        logs = {join(directory, f"{d}.parquet") for d in subdirectories}  # of img2dataset's `files` output
        found = _of_one_format(
            directory,
            [f for f in files if not is_junk(name(f)) and f not in logs and format_by_name(f) and is_file(f)],
        )
        if found:
            if folders != [directory]:
                refuse_several_splits(directory, {name(parent(f)) for f in found})
            if format_by_name(found[0]) == "table" and has_pairs(directory, Columns()):
                status(
                    f"warning: the texts beside the images in {directory} are not read, only {name(found[0])}"
                )
            if format_by_name(found[0]) in ("tar", "tfrecord", "array_record"):
                _note_unread_images([directory, *(join(directory, d) for d in subdirectories)], found)
            return found
    table = join(directory, "captions.txt")  # Flickr8k's, beside a folder of images
    if is_file(table) and not has_pairs(directory, Columns()):
        return [table]
    refuse_several_splits(directory, set(subdirectories))
    return image_sources(directory)


def _note_unread_images(folders: list[str], found: list[str]) -> None:
    for folder in folders[:100]:
        if any(suffix(file) in IMAGE_SUFFIXES for file in list_names(folder)[:1000]):
            status(f"warning: the images in {folder} are not read, only {name(found[0])} and files like it")
            return


def _of_one_format(directory: str, found: list[str]) -> list[str]:
    files: dict[str, list[str]] = {}
    for file in found:
        files.setdefault(format_by_name(file), []).append(file)
    files.pop("", None)
    files.pop("json", None)
    for kind in ("tar", "tfrecord"):
        stems = {os.path.splitext(f)[0] for f in files.get(kind, [])}
        if stems and all(os.path.splitext(f)[0] in stems for f in files.get("parquet", [])):
            files.pop("parquet", None)  # img2dataset's log beside each file
    if len(files) > 1:
        suffixes = sorted({suffix(f) or f for group in files.values() for f in group[:1]})
        raise UserError(
            f"source {directory} holds {' and '.join(suffixes)} files; name those to read, as in "
            f"{directory.rstrip('/')}/*.tar"
        )
    return next(iter(files.values()), [])


def _braces(pattern: str) -> list[str]:
    """Expand `{a,b}` and `{00..12}`; braces without either stay as they are."""
    for match in re.finditer(r"\{([^{}]*)\}", pattern):
        body = match[1]
        if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", body):
            first, last = int(bounds[1]), int(bounds[2])
            if not 0 <= last - first < 1_000_000:
                raise UserError(
                    f"source {pattern}: {{{body}}} is not a range of up to a million numbers; write it as in "
                    "{00000..00099}"
                )
            width = len(bounds[1]) if bounds[1].startswith("0") else 0
            choices = [f"{n:0{width}d}" for n in range(first, last + 1)]
        elif "," in body:
            choices = body.split(",")
        else:
            continue
        before, after = pattern[: match.start()], pattern[match.end() :]
        return [full for choice in choices for full in _braces(f"{before}{choice}{after}")]
    return [pattern]
