"""`lit-fast import-features`: make a dataset of features from another program.

Rows keep the order of the files. The index is written first, as if the rows had been indexed, then the features shard
by shard, each with its manifest last. If a process is killed, the same command continues. The index has the file of
each row's feature, so that of many files only a few are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from lit_fast.data.dataset import BLOCK, SHARD, Dataset, Source, decode_block, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.embed.extract import check_store_name, write_provenance
from lit_fast.embed.importers.captions import check_metadata, imported_rows
from lit_fast.embed.importers.parts import Part, find_parts, read_pieces
from lit_fast.embed.index import check_output_directory, remove_leftovers
from lit_fast.embed.locks import lock_rows
from lit_fast.embed.shard_writer import write_shard
from lit_fast.embed.skipped import KeySet, SkippedLog
from lit_fast.embed.sources.interface import Columns, is_utf8
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, sha256, size
from lit_fast.storage.lock import Lock, LostLockError
from lit_fast.storage.paths import StrPath, join, parent
from lit_fast.utils.output import result
from lit_fast.utils.progress import Progress
from lit_fast.version import __version__

_GROUP_ROWS = 1 << 16  # rows whose keys are compared with the earlier ones at a time


def import_features(
    source: StrPath,
    out: StrPath,
    tower: str,
    format: str,
    *,
    table: StrPath | None = None,
    options: Columns | None = None,
) -> None:
    """Make a dataset of the features in `source`, or continue an unfinished one.

    Args:
      tower: name of the model that made them. Features of the same name and width count as features of the same
        tower, which cannot be checked.
      format: "clip-retrieval" or "sail", see `lit_fast.embed.importers.parts`.
      table: captions, one row per row of features in their order; for clip-retrieval instead of its metadata.
      options: the columns with captions.

    Raises:
      UserError: files are missing or damaged or do not fit each other, `out` holds something else, or no row has a
        usable feature.
    """
    name, options = check_store_name(tower), options or Columns()
    source, out = os.path.abspath(source), os.fspath(out)
    table = os.path.abspath(table) if table else ""
    if not is_utf8(f"{source}{out}"):
        raise UserError(f"the name {source!a} or {out!a} is not UTF-8; rename it")
    parts = find_parts(source, format)
    if not table:
        check_metadata(parts)
    given = (*options.as_options(), *([f"captions_table={table}"] if table else []))
    sources = [Source(part.path, size(part.path), "features", names=given) for part in parts]
    if not exists(join(out, "dataset.json")):
        check_output_directory(out)
    with lock_rows(out) as lock:
        if exists(join(out, "dataset.json")):
            dataset = open_dataset(out)
            if dataset.sources != tuple(sources):
                raise UserError(
                    f"{out} is already a dataset, of other sources or options; choose another --out"
                )
        else:
            dataset = _write_index(parts, sources, out, lock, table, options)
        features = Features(dataset, name, _provenance(parts, name, source, format, table, options))
        if write_provenance(features):
            raise UserError(
                f"{features.path} was made of other files, or these have changed; choose another --out"
            )
        if len(features.finished()) < dataset.shards:
            _write_features(features, lock, parts)
    _report(features)


def _provenance(
    parts: list[Part], name: str, source: str, format: str, table: str, options: Columns
) -> dict[str, Any]:
    """Return the content of `tower.json`: name of the model, files of the features."""
    width = parts[0].width
    files = [[os.path.relpath(part.path, source), sha256(part.path)] for part in parts]
    first_view, identity = (
        hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
        for known in (["imported", name, width], ["imported", name, width, files])
    )
    return {
        "name": name,
        "source": source,
        "identity": identity,
        # Other datasets come from other files; by the name they are of the same model.
        "first_view": first_view,
        "width": width,
        "dtype": parts[0].dtype,
        "imported": {
            "format": format,
            "captions_table": table,
            "captions": next(iter(options.as_options()), "").removeprefix("captions="),
            "files": files,
        },
        "versions": {"lit_fast": __version__},
    }


def _write_index(
    parts: list[Part], sources: list[Source], out: str, lock: Lock, table: str, options: Columns
) -> Dataset:
    """Write index and captions of all rows in order, except rows with a repeated key."""
    check_output_directory(out)
    skipped, keys = SkippedLog(), KeySet()
    writer: DatasetWriter | None = None

    def usable_rows() -> Iterator[Row]:
        for row, problem in imported_rows(parts, table, options):
            if problem:
                skipped.add(row.key, sources[row.source].path, problem)
            else:
                yield row

    try:
        rows = usable_rows()
        while group := list(islice(rows, _GROUP_ROWS)):
            lock.check()
            for row, is_new in zip(
                group, keys.add([(row.source, row.key) for row in group]).tolist(), strict=True
            ):
                if is_new:
                    writer = writer or DatasetWriter(out)
                    writer.add(row)
                else:
                    skipped.add(row.key, sources[row.source].path, "duplicate key")
        if writer is None:
            raise UserError("; ".join([f"no usable row in {parent(parts[0].path)}", skipped.report()]))
    except LostLockError:  # the files are another process's
        raise
    except UserError:
        remove_leftovers(out, None)
        raise
    lock.check()
    skipped.write(out, 0)
    dataset = writer.finish(seed=0, sources=sources, left_out=skipped.counts)
    if report := skipped.report():
        result(report)
    return dataset


def _write_features(features: Features, lock: Lock, parts: list[Part]) -> None:
    """Write the unfinished shards."""
    dataset, finished = features.dataset, set(features.finished())
    array = features.array(create=True)
    done = sum(map(features.shard_rows, finished))
    progress = Progress("import", dataset.rows, "rows", start=done)
    read_part = lru_cache(maxsize=4)(lambda number: _read_part(parts[number]))
    index = dataset.index_reader()
    for shard in range(dataset.shards):
        if shard in finished:
            continue
        first, rows = shard * SHARD, features.shard_rows(shard)
        values, invalid = np.zeros((rows, features.width), BFLOAT16), dict[int, str]()
        for lo in range(0, rows, BLOCK):
            block = decode_block(index.read((first + lo) // BLOCK))
            sources, offsets = np.array(block.sources), np.array(block.offsets)
            for source in np.unique(sources).tolist():
                positions = np.flatnonzero(sources == source)
                with np.errstate(over="ignore"):  # too large a value becomes infinite, and its row invalid
                    read = read_part(source)[offsets[positions]].astype(np.float32)
                    values[lo + positions] = read.astype(BFLOAT16)
            invalid |= {lo + row: why for row, why in _invalid_rows(values[lo : lo + BLOCK]).items()}
        values[list(invalid)] = 0
        lock.check()
        write_shard(features, array, shard, values, {first + row: why for row, why in invalid.items()})
        progress.advance(rows)
    progress.close()


def _read_part(part: Part) -> np.ndarray:
    """Return the features `[rows, width]` of a part; one array maps the file."""
    pieces = read_pieces(part.path)
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if joined.shape != (part.rows, part.width):
        raise UserError(f"{part.path} has changed while it was read; rerun the same command")
    return joined


def _invalid_rows(values: np.ndarray) -> dict[int, str]:
    """Return the rows of bfloat16 `[n, width]` that cannot be features, with reasons."""
    wide = values.astype(np.float32)
    reasons = dict.fromkeys(np.flatnonzero(~wide.any(axis=1)).tolist(), "zero feature")
    return reasons | dict.fromkeys(
        np.flatnonzero(~np.isfinite(wide).all(axis=1)).tolist(), "non-finite feature"
    )


def _report(features: Features) -> None:
    dataset, invalid = features.dataset, features.invalid_rows()
    if len(invalid) == dataset.rows:
        raise UserError(
            f"none of the {dataset.rows:,} rows has a usable feature (first: {next(iter(invalid.values()))}); "
            f"fix the cause, then delete {dataset.path} and rerun"
        )
    result(
        f"imported {dataset.rows:,} rows with {dataset.captions:,} captions into {dataset.path}, features "
        f"{features.tower} of width {features.width}: {dataset.rows - len(invalid):,} valid, {len(invalid):,} invalid"
    )
