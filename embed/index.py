"""`lit-fast index`: write the rows of a dataset in order; add rows at its end.

Each source is read once. The order of the sources, and of the rows in groups of sources, is drawn from a seed, so that
a shard of rows can later be read nearly sequentially.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lit_fast.data.dataset import Dataset, Source, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row, other_generations, remove_other_generations
from lit_fast.data.images.noise import is_noise
from lit_fast.data.images.sources import check_sources, identify_all
from lit_fast.embed.class_names import (
    ClassOptions,
    check_labels,
    check_same_names,
    find_class_names,
    report_labels,
)
from lit_fast.embed.locks import check_parts_are_unlocked, lock_rows
from lit_fast.embed.row_reader import RowReader
from lit_fast.embed.skipped import KeySet
from lit_fast.embed.sources.expand import expand
from lit_fast.embed.sources.formats import format_of, refuse_pointer
from lit_fast.embed.sources.image_paths import NOT_FOUND
from lit_fast.embed.sources.interface import Columns, is_utf8
from lit_fast.errors import UserError
from lit_fast.storage.files import check_readable, exists, is_directory, list_names, local_path, remove_tree
from lit_fast.storage.lock import Lock, LostLockError
from lit_fast.storage.paths import StrPath, absolute, is_junk, is_url, join, parent
from lit_fast.utils.output import result, status
from lit_fast.utils.permutation import permutation

_DUPLICATE = "duplicate key"
_DUPLICATE_REMEDY = (
    "a key is unique within its source: of each duplicate the first was taken; to have all, decline a column with "
    "--key '', sort a table by its image, whose captions then become one row, or split an archive"
)
_WITH_IMAGES = ("tar", "parquet", "tfrecord", "array_record")  # kinds of sources
_OWN_FILES = {"index", "captions", "left_out.jsonl"}  # of an indexing that was killed


def index_dataset(
    sources: list[str],
    out: StrPath,
    *,
    seed: int = 0,
    options: Columns | None = None,
    append: bool = False,
    classes: ClassOptions | None = None,
) -> Dataset:
    """Index `sources` (see `expand`) into a new dataset, or append to an existing one.

    Raises:
      UserError: no source, no usable row, `out` holds something else, or a source has changed.
    """
    out, options, classes = os.fspath(out), options or Columns(), classes or ClassOptions()
    if not is_utf8(out):
        raise UserError(f"the name {out!a} is not UTF-8; choose another --out")
    if options.images and is_url(options.images):
        check_readable(options.images)
    elif options.images:
        options = replace(options, images=os.path.abspath(local_path(options.images)))
    found = _find_sources(sources, options)
    if exists(join(out, "dataset.json")):
        old = open_dataset(out)
        # Without these nothing is written, so that no lock is needed.
        if not other_generations(old) and not _new_sources(old, found, seed, append):
            return _report_known(old, found, classes)
    else:
        check_output_directory(out)
    with lock_rows(out) as lock:
        return _index(found, out, lock, seed, options, append, classes)


def _index(
    found: list[Source],
    out: str,
    lock: Lock,
    seed: int,
    options: Columns,
    append: bool,
    classes: ClassOptions,
) -> Dataset:
    """Write a dataset that this process has locked."""
    old: Dataset | None = None
    if exists(join(out, "dataset.json")):
        old = open_dataset(out)
        remove_other_generations(old)  # of a growth that was killed
        all_found, found = found, _new_sources(old, found, seed, append)
        if not found:
            return _report_known(old, all_found, classes)
        check_parts_are_unlocked(out)
        check_sources(old)
    else:
        check_output_directory(out)

    _warn_of_copies(found, old)
    classnames, templates = find_class_names(found, classes, old)
    reader = RowReader(found, options, len(old.sources) if old else 0, len(classnames))
    try:
        writer = _write_rows(reader, out, lock, seed, old)
        check_labels(reader.labels, classnames)
    except LostLockError:  # the files are another process's
        raise
    except UserError:
        remove_leftovers(out, old)
        raise
    if old is None:
        report_labels(reader.labels, classnames)
    for description in [*reader.damages, *reader.notes]:
        status(f"warning: {description}")
    lock.check()
    reader.skipped.write(out, old.generation + 1 if old else 0)
    dataset = writer.finish(
        seed=seed,
        sources=[*(old.sources if old else ()), *reader.sources],
        classnames=classnames,
        templates=templates,
        left_out=reader.skipped.total_counts(old.left_out if old else {}),
    )
    _report(dataset, old, len(found))
    if report := reader.skipped.report():
        result(report)
    if _DUPLICATE in reader.skipped.counts:
        status(f"note: {_DUPLICATE_REMEDY}")
    return dataset


def check_output_directory(out: str) -> None:
    """Raise UserError if `out` has files, except those of an indexing that was killed."""
    if exists(out) and not is_directory(out):
        raise UserError(f"{out} is a file; choose another --out")
    others = [
        name
        for name in list_names(out)
        if name not in _OWN_FILES and not name.endswith(".tmp") and not is_junk(name)
    ]
    if others:
        raise UserError(f"{out} holds other files ({others[0]}); choose an empty or new directory as --out")


def remove_leftovers(out: str, old: Dataset | None) -> None:
    """Delete the files of an indexing that is refused or was killed before; `old` is the dataset that was to grow."""
    if old is not None:
        remove_other_generations(old)
    else:
        remove_tree(join(out, "index"))
        remove_tree(join(out, "captions"))


def _find_sources(patterns: list[str], options: Columns) -> list[Source]:
    """Return the sources; `kind` is the name of the format until the source is read."""
    paths = expand(patterns)
    for path in [*paths, options.images]:
        if not is_utf8(path):
            raise UserError(f"the name {path!a} is not UTF-8; rename it")
    found = [Source(path, 0, format_of(path, options), names=options.as_options()) for path in paths]
    found = identify_all(found)
    for source in found:
        refuse_pointer(source)
    return found


def _new_sources(old: Dataset, found: list[Source], seed: int, append: bool) -> list[Source]:
    """Return those of `found` that the dataset does not have yet.

    Raises:
      UserError: a known source has changed, or the dataset was made with another seed, other sources or options.
    """
    known = {source.path: source for source in old.sources}
    new = [source for source in found if source.path not in known]
    other = f"{old.path} is already a dataset, of other sources or another seed"
    remedy = "the order of a dataset never changes; choose another --out"
    if old.seed != seed:
        raise UserError(f"{other} ({old.seed}); {remedy}")
    for source in found:
        before = known.get(source.path, source)
        if (before.bytes, before.etag, before.digest or source.digest) != (
            source.bytes,
            source.etag,
            source.digest,
        ):
            raise UserError(f"{other}: {source.path} has changed since it was indexed; {remedy}")
        if before.names != source.names:
            action = "name only new sources with these options" if append else remedy
            raise UserError(f"{other}: {source.path} was indexed with other options; {action}")
    if append:
        return new
    if len(found) - len(new) < len(known):
        raise UserError(f"{other}; {remedy}")
    if new:
        raise UserError(
            f"{old.path} is already a dataset, without {_some_of(new)}; to add their rows at its end, give --append"
        )
    return []


def _warn_of_copies(found: list[Source], old: Dataset | None) -> None:
    """Warn of sources that are the same file as another one, by a link or as a copy: no key tells their rows apart."""
    first: dict[object, str] = {}
    copies: list[tuple[str, str]] = []
    for source in [*(old.sources if old else ()), *found]:
        # The images of a table are another's where it is in another directory.
        place = "" if source.kind in _WITH_IMAGES else absolute(parent(source.path))
        identity = (source.digest, place) if source.digest else absolute(source.path)
        if (other := first.setdefault(identity, source.path)) != source.path:
            copies.append((source.path, other))
    if copies:
        status(
            f"warning: {copies[0][0]} has the same content as {copies[0][1]}"
            + (f", and {len(copies) - 1:,} more sources have that of another" if len(copies) > 1 else "")
            + ": their rows are in the dataset twice; give only one of them"
        )


def _write_rows(reader: RowReader, out: str, lock: Lock, seed: int, old: Dataset | None) -> DatasetWriter:
    """Write all rows in their order; the caller finishes the writer.

    Raises:
      LostLockError: another process has taken over the directory.
      UserError: there is no usable row.
    """
    keys = KeySet()
    sources = [*(old.sources if old else ()), *reader.sources]
    noise = len(sources)  # noise:N begins with the images of noise:M, M < N
    identity = [noise if is_noise(source.path) else number for number, source in enumerate(sources)]
    for block in old.iter_blocks() if old else ():
        keys.add([(identity[s], key) for s, key in zip(block.sources, block.keys, strict=True)])
    writer: DatasetWriter | None = None
    for number, group in enumerate(reader.groups(seed)):
        lock.check()
        is_new = keys.add([(identity[row.source], row.key) for row in group])
        for i in np.flatnonzero(~is_new).tolist():
            reader.skip(group[i], _DUPLICATE)
        rows = [group[i] for i in np.flatnonzero(is_new).tolist()]
        for i in _shuffled(rows, reader, seed, number):
            writer = writer or DatasetWriter(out, grow=old)
            writer.add(rows[i])
    if writer is None:
        reasons = [*reader.damages[:1], *filter(None, [reader.skipped.report()]), *reader.notes[:1]]
        if any(reason.startswith(NOT_FOUND) for reason in reader.skipped.counts):
            reasons.append("give the directory that the paths start from with --images")
        raise UserError("; ".join([f"no usable row in {_some_of(reader.sources)}", *reasons]))
    return writer


def _shuffled(rows: list[Row], reader: RowReader, seed: int, group: int) -> Iterator[int]:
    """Yield the shuffled positions of a group's rows.

    Rows of one parquet row group stay together, shuffled among themselves: embedding decodes a whole row group, and
    would decode it once per row if they were scattered.
    """
    runs: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        together = reader.source_of(row).kind == "parquet"
        runs.setdefault((row.source, row.offset) if together else (-1, i), []).append(i)
    members = list(runs.values())
    for run in permutation(len(members), seed, 1, group).tolist():
        positions = members[run]
        if len(positions) == 1:
            yield positions[0]
        else:
            yield from (positions[i] for i in permutation(len(positions), seed, 2, group, run).tolist())


def _report_known(dataset: Dataset, found: list[Source], classes: ClassOptions) -> Dataset:
    check_same_names(found, classes, dataset)
    result(f"{dataset.path} is already indexed: {dataset.rows:,} rows with {dataset.captions:,} captions")
    if directories := [source for source in found if source.kind in ("folder", "pairs")]:
        status(
            f"note: {_some_of(directories)} was not read again; files that were added to it since are not in the "
            "dataset: put them into a directory of their own and give that to --append"
        )
    return dataset


def _report(dataset: Dataset, old: Dataset | None, files: int) -> None:
    rows, captions, labels = (
        getattr(dataset, name) - (getattr(old, name) if old else 0)
        for name in ("rows", "captions", "labelled")
    )
    result(
        f"indexed {rows:,} rows with {captions:,} captions"
        + (f" and {labels:,} labels" if labels else "")
        + f" from {files} file{'s' if files > 1 else ''} into {dataset.path}"
        + (f", which has {dataset.rows:,} rows now" if old else "")
    )


def _some_of(sources: list[Source]) -> str:
    return sources[0].path + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
