"""`lit-fast index`: fixes the rows of a dataset and their order for good, and lets it grow at its end.

Each source is read once. The order of the sources and of the rows in groups of sources is drawn from a seed,
so that a shard of rows can later be read nearly sequentially.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from lit_fast.data.dataset import (
    SHARD,
    Dataset,
    DatasetWriter,
    Row,
    Source,
    open_dataset,
    remove_other_generations,
)
from lit_fast.data.images.sources import check_sources, size_and_etag
from lit_fast.embed.key_set import KeySet
from lit_fast.embed.skipped import LeftOut, damaged
from lit_fast.embed.sources import items
from lit_fast.embed.sources.expand import expand
from lit_fast.embed.sources.items import Damage, Layout, Names, Sample, is_text
from lit_fast.embed.sources.read import class_names, read_source
from lit_fast.errors import UserError
from lit_fast.storage.remote import is_remote
from lit_fast.utils.permutation import permutation
from lit_fast.utils.progress import Progress

GROUP_ROWS = 4 * SHARD  # a group of sources closes when it has this many rows

_OWN = {"index", "captions", "left_out.jsonl"}  # what a killed indexing may have left


def index_dataset(
    sources: list[str], out: Path, *, seed: int = 0, names: Names | None = None, append: bool = False
) -> Dataset:
    """Index what `sources` mean into a new dataset at `out`; with `append`, add to the one that is there.

    Raises:
      UserError: nothing to read, no usable row, `out` holds something else, or a source has changed.
    """
    names = names or Names()
    if not is_text(str(out)):
        raise UserError(f"the name {str(out)!a} is not UTF-8; choose another --out")
    if names.images and not is_remote(names.images):
        names = replace(names, images=str(Path(names.images).absolute()))
    found = _described(expand(sources), names)
    old: Dataset | None = None
    if (out / "dataset.json").exists():
        old = open_dataset(out)
        remove_other_generations(old)  # of a growing that was killed
        found = _new_sources(old, found, seed, append)
        if not found:
            print(f"{out} is already indexed: {old.rows:,} rows with {old.captions:,} captions")
            return old
        check_sources(old)
    else:
        check_out(out)
    return _index(found, out, seed, names, old)


def _index(found: list[Source], out: Path, seed: int, names: Names, old: Dataset | None) -> Dataset:
    existed = out.exists()
    classnames, templates = _class_names([source.path for source in found], old)
    reading = Reading(found, names, len(old.sources) if old else 0, len(classnames))
    left_out = reading.left_out
    try:
        writer = _write(reading, out, seed, old)
        if writer is None:
            where = found[0].path + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            why = f"; {reading.damages[0]}" if reading.damages else ""
            raise UserError(f"no usable row in {where}{why}{left_out.why()}")
    except UserError:
        remove_leftovers(out, existed, old)
        raise
    for line in reading.damages:
        print(f"warning: {line}", file=sys.stderr)
    left_out.write(out, old.generation + 1 if old else 0)
    dataset = writer.finish(
        seed=seed,
        sources=[*(old.sources if old else ()), *reading.sources],
        classnames=classnames,
        templates=templates,
        left_out=left_out.together(old.left_out if old else {}),
    )
    _report(dataset, old, len(found))
    if left_out.counts:
        print(left_out.report())
    return dataset


def _write(reading: Reading, out: Path, seed: int, old: Dataset | None) -> DatasetWriter | None:
    """Write the rows in their order, but for the end; None if there is none."""
    keys = KeySet()
    for block in old.iter_blocks() if old else ():
        keys.add(block.keys)
    writer: DatasetWriter | None = None
    for number, group in enumerate(reading.groups(seed)):
        fresh = keys.add([row.key for row in group])
        for row in (group[i] for i in np.flatnonzero(~fresh)):
            reading.leave_out(row, "duplicate key")
        rows = [group[i] for i in np.flatnonzero(fresh)]
        for i in _order(rows, reading, seed, number):
            writer = writer or DatasetWriter(out, grow=old)
            writer.add(rows[i])
    return writer


def _report(dataset: Dataset, old: Dataset | None, files: int) -> None:
    rows, captions, labels = (
        getattr(dataset, name) - (getattr(old, name) if old else 0)
        for name in ("rows", "captions", "labelled")
    )
    print(
        f"indexed {rows:,} rows with {captions:,} captions"
        + (f" and {labels:,} labels" if labels else "")
        + f" from {files} file{'s' if files > 1 else ''} into {dataset.path}"
        + (f", which has {dataset.rows:,} rows now" if old else "")
    )


def _described(paths: list[str], names: Names) -> list[Source]:
    for path in [*paths, names.images]:
        if not is_text(path):
            raise UserError(f"the name {path!a} is not UTF-8; rename it")
    # Remote files are asked for one by one, hence the threads.
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(size_and_etag, paths))
    return [
        Source(path, size, etag=etag, names=names.told())
        for path, (size, etag) in zip(paths, sizes, strict=True)
    ]


def _new_sources(old: Dataset, found: list[Source], seed: int, append: bool) -> list[Source]:
    """Those of `found` that the dataset does not have yet.

    Raises:
      UserError: a known one has changed, or the call means another dataset than the one that is there.
    """
    have = {source.path: source for source in old.sources}
    new = [source for source in found if source.path not in have]
    other = f"{old.path} is already a dataset, of other sources or another seed"
    fixed = "the order of a dataset is fixed for good: choose another --out"
    if old.seed != seed:
        raise UserError(f"{other} ({old.seed}); {fixed}")
    for source in found:
        was = have.get(source.path, source)
        if (was.bytes, was.etag) != (source.bytes, source.etag):
            raise UserError(f"{other}: {source.path} has changed since it was indexed; {fixed}")
        if was.names != source.names and not append:
            raise UserError(f"{other}: {source.path} was indexed with other options; {fixed}")
    if append:
        return new
    if len(found) - len(new) < len(have):
        raise UserError(f"{other}; {fixed}")
    if new:
        raise UserError(
            f"{old.path} is already a dataset, without {new[0].path}"
            + (f" and {len(new) - 1} more" if len(new) > 1 else "")
            + "; to add their rows at its end, give --append"
        )
    return []


class Reading:
    """Sources on their way to rows: fills `sources`, `left_out` and `damages` as it goes."""

    def __init__(self, found: list[Source], names: Names, first: int, classes: int) -> None:
        self.sources = list(found)
        self.first = first  # number of the first source in the dataset
        self.left_out = LeftOut()
        self.damages: list[str] = []
        self._names, self._classes = names, classes

    def leave_out(self, row: Row, reason: str) -> None:
        """Count a row that will not be one after all."""
        self.left_out.add(row.key, self.sources[row.source - self.first].path, reason)

    def groups(self, seed: int) -> Iterator[list[Row]]:
        """The sources in an order drawn from the seed, in groups of whole ones.

        A group closes after a source when it has `GROUP_ROWS`, and within a source when it has twice as many:
        no more rows are in memory.
        """
        progress = Progress("index", len(self.sources), "files")
        group = _Group()
        total = 0
        for number in (int(i) for i in permutation(len(self.sources), seed, 0)):
            for row in self._rows(number):
                group.add(row, self.sources[number].kind == "folder")
                if len(group.rows) >= 2 * GROUP_ROWS:
                    total += len(group.rows)
                    progress.advance(0, f"{total:,} rows")
                    yield group.rows
                    group = _Group()
            progress.advance(1, f"{total + len(group.rows):,} rows")
            if len(group.rows) >= GROUP_ROWS:
                total += len(group.rows)
                yield group.rows
                group = _Group()
        if group.rows:
            yield group.rows
        progress.close()

    def _rows(self, number: int) -> Iterator[Row]:
        path = self.sources[number].path
        for item in read_source(path, self._names):
            match item:
                case Layout(kind, image, images):
                    self.sources[number] = replace(
                        self.sources[number], kind=kind, image=image, images=images
                    )
                case items.LeftOut(key, reason):
                    self.left_out.add(key, path, reason)
                case Damage(where):
                    self.damages.append(where)
                    self.left_out.add("the rest", path, damaged)
                case Sample() if self._classes and item.label >= self._classes:
                    self.left_out.add(item.key, path, f"label outside the {self._classes} class names")
                case Sample(key, offset, size, captions, label, languages):
                    yield Row(key, self.first + number, offset, size, captions, label, languages)


class _Group:
    """Rows of one group. Repeats of an image file are one row with all captions."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._files: dict[tuple[int, str], int] = {}

    def add(self, row: Row, file: bool) -> None:
        """Append a row, or its captions to the row of the same source that has the same image file."""
        if not file:
            self.rows.append(row)
            return
        place = self._files.setdefault((row.source, row.key), len(self.rows))
        if place == len(self.rows):
            self.rows.append(row)
        else:
            self.rows[place] = _merged(self.rows[place], row)


def _merged(first: Row, second: Row) -> Row:
    # A row without languages has captions of unknown ones.
    one, two = (row.languages or ("",) * len(row.captions) for row in (first, second))
    captions = dict(zip(second.captions, two, strict=True)) | dict(zip(first.captions, one, strict=True))
    ordered = list(dict.fromkeys((*first.captions, *second.captions)))
    languages = tuple(captions[caption] for caption in ordered)
    label = first.label if first.label >= 0 else second.label
    return replace(first, captions=tuple(ordered), languages=languages if any(languages) else (), label=label)


def _order(rows: list[Row], reading: Reading, seed: int, number: int) -> Iterator[int]:
    """The shuffled order of a group's rows.

    Rows of one parquet row group stay together, shuffled among themselves: embedding must decode a row group
    as a whole, and would do so again and again for rows that are scattered.
    """
    runs: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        together = reading.sources[row.source - reading.first].kind == "parquet"
        runs.setdefault((row.source, row.offset) if together else (-1, i), []).append(i)
    members = list(runs.values())
    for run in permutation(len(members), seed, 1, number).tolist():
        inside = members[run]
        if len(inside) == 1:
            yield inside[0]
        else:
            yield from (inside[i] for i in permutation(len(inside), seed, 2, number, run).tolist())


def check_out(out: Path) -> None:
    """Refuse a place for a new dataset that holds anything but what a killed indexing has left."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    others = [p.name for p in out.iterdir() if p.name not in _OWN and not p.name.endswith(".tmp")]
    if others:
        raise UserError(
            f"{out} holds other files ({sorted(others)[0]}); choose an empty or new directory as --out"
        )


def remove_leftovers(out: Path, existed: bool, old: Dataset | None) -> None:
    """A refusal leaves nothing behind, not even what a killed indexing had left."""
    if old is not None:
        remove_other_generations(old)
        return
    for name in ("index", "captions"):
        shutil.rmtree(out / name, ignore_errors=True)
    if not existed and out.exists():
        out.rmdir()


def _class_names(paths: list[str], old: Dataset | None) -> tuple[list[str], list[str]]:
    """The class names and prompt templates, if all sources have the same; else nothing.

    Raises:
      UserError: the dataset that grows has others, so that its labels would mean something else.
    """
    found = class_names(paths)
    if old is not None and old.classnames:
        if any(classnames != old.classnames for classnames, _ in found):
            raise UserError(
                f"{paths[0]} has other class names than {old.path}; index it as a dataset of its own"
            )
        return list(old.classnames), list(old.templates)
    if len(found) > 1 or old is not None:
        if any(any(pair) for pair in found):
            print("warning: the sources have different class names, so none are stored", file=sys.stderr)
        return [], []
    classnames, templates = found.pop()
    return list(classnames), list(templates)
