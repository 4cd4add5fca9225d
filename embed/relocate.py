"""`lit-fast index --relocate`: connect a dataset to its sources at another place.

Only `dataset.json` is written. A source is accepted if it has the recorded size and digest; then evenly spaced rows
are read and their images compared with the checksums of the index.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lit_fast.data.dataset import Dataset, Source, open_dataset
from lit_fast.data.dataset_writer import write_sources
from lit_fast.data.images.decode import ImageError
from lit_fast.data.images.noise import is_noise
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.images.sources import find_other_content, identify_all
from lit_fast.embed.locks import check_parts_are_unlocked, lock_rows
from lit_fast.errors import UserError
from lit_fast.storage.files import is_directory
from lit_fast.storage.lock import Lock
from lit_fast.storage.paths import StrPath, is_url
from lit_fast.utils.output import result

_SAMPLE = 256  # rows
_SHOWN = 5  # directories in a message


def relocate_sources(path: StrPath, moves: Sequence[str]) -> Dataset:
    """Replace the beginnings of the sources' paths and return the dataset.

    Args:
      path: the dataset.
      moves: `OLD=NEW` each, paths or URLs of files or directories. All are applied at once, so that two directories
        can be exchanged.

    Raises:
      UserError: no source begins with OLD, a file at NEW is missing or is another than the indexed one, or two
        sources would be the same file.
    """
    open_dataset(path)
    with lock_rows(path) as lock:
        check_parts_are_unlocked(path)
        return _relocate(open_dataset(path), moves, lock)


def _relocate(dataset: Dataset, moves: Sequence[str], lock: Lock) -> Dataset:
    """Replace the sources of a dataset that this process has locked."""
    sources = list(dataset.sources)
    moved: set[int] = set()
    pairs = [_split(move, dataset.sources) for move in moves]
    pairs.sort(key=lambda pair: -len(pair[0]))  # the innermost directory decides
    for number, source in enumerate(dataset.sources):
        if any(_below(place, old) for place in (source.path, source.images) for old, _ in pairs):
            sources[number] = _moved_source(source, pairs)
            moved.add(number)
    _refuse_meeting(sources)
    for number, found in zip(sorted(moved), identify_all([sources[n] for n in sorted(moved)]), strict=True):
        sources[number] = _accepted(sources[number], found)
    relocated = replace(dataset, sources=tuple(sources))
    compared = _compare_images(relocated, moved)
    lock.check()
    write_sources(relocated)
    digests = sum(bool(dataset.sources[n].digest and sources[n].digest) for n in moved)
    result(
        f"{relocated.path}: {len(moved):,} of {len(sources):,} sources are at their new place: sizes equal, "
        f"{digests:,} digests equal, {compared:,} sampled images equal"
    )
    return relocated


def _split(move: str, sources: Sequence[Source]) -> tuple[str, str]:
    """Split `OLD=NEW` at the first `=` before which there is the beginning of a source's path."""
    for i, character in enumerate(move):
        if character != "=" or not move[i + 1 :]:
            continue
        for old in dict.fromkeys((move[:i], _absolute(move[:i]))):
            if old and any(_below(s.path, old) or _below(s.images, old) for s in sources):
                return old, _absolute(move[i + 1 :])
    known = dict.fromkeys(
        os.path.dirname(place)
        for s in sources
        if not is_noise(s.path)
        for place in (s.path, s.images)
        if place
    )
    shown = ", ".join(list(known)[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
    raise UserError(f"--relocate {move}: no source begins with OLD; the sources are in {shown or 'no files'}")


def _absolute(location: str) -> str:
    return location.rstrip("/") if is_url(location) else os.path.abspath(location)


def _below(location: str, directory: str) -> bool:
    directory = directory.rstrip("/")
    return location == directory or location.startswith(f"{directory}/")


def _moved_source(source: Source, pairs: Sequence[tuple[str, str]]) -> Source:
    option = "images="  # of `lit-fast index`
    names = tuple(
        option + _moved(name.removeprefix(option), pairs) if name.startswith(option) else name
        for name in source.names
    )
    return replace(source, path=_moved(source.path, pairs), images=_moved(source.images, pairs), names=names)


def _moved(location: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        if _below(location, old):
            return new.rstrip("/") + location[len(old.rstrip("/")) :]
    return location


def _refuse_meeting(sources: Sequence[Source]) -> None:
    """Raise UserError if two sources have one path: no later move could tell them apart."""
    paths = Counter(source.path for source in sources)
    if meeting := [path for path, count in paths.items() if count > 1]:
        raise UserError(
            f"{meeting[0]} would be {paths[meeting[0]]} sources of the dataset; give all moves in one command, a "
            "--relocate for each"
        )


def _accepted(source: Source, found: Source) -> Source:
    """Return the source as it is recorded at its new place.

    Args:
      source: with the new path and the size, digest and ETag from the time of indexing.
      found: with those of the file that is there now.

    Raises:
      UserError: it is another file.
    """
    change = f"has {found.bytes} bytes, but had {source.bytes} when it was indexed"
    if found.bytes == source.bytes:
        change = find_other_content(source)
    if change:
        raise UserError(f"source {source.path} {change}; give the place of the file that was indexed")
    if source.images and not is_url(source.images) and not is_directory(source.images):
        raise UserError(
            f"{source.images}, the images of {source.path}, is missing; give --relocate for it too"
        )
    # The digest stays where the file has none of its own, so that it can be compared after the next move.
    return replace(found, digest=found.digest or source.digest)


def _compare_images(dataset: Dataset, moved: set[int]) -> int:
    """Compare evenly spaced rows with their checksums; return the number of those compared.

    Raises:
      UserError: an image is another than the indexed one.
    """
    reader, compared = ImageReader(dataset), 0
    for row in sorted({dataset.rows * i // _SAMPLE for i in range(_SAMPLE)}):
        block, i = reader.locate(row)
        if block.sources[i] not in moved or not block.check(i):
            continue
        try:
            reader.read(row)
        except ImageError as error:
            name = dataset.row_name(block, i)
            raise UserError(
                f"the image of row {row:,} ({name}) is not at its new place: {error}; restore it, then rerun "
                "the same command"
            ) from None
        compared += 1
    return compared
