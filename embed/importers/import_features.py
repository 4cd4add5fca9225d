"""`lit-fast import-features`: make a dataset of features from another program.

Rows keep the order of the files. The index is written first, as if the rows had been indexed, then the features shard
by shard, each with its manifest last. If a process is killed, the same command continues. The index has the file of
each row's feature, so that of many files only a few are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from lit_fast.data.dataset import BLOCK, SHARD, Dataset, Source, decode_block, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.embed.extract import check_store_name, write_provenance
from lit_fast.embed.importers.captions import check_metadata, find_tables, imported_rows
from lit_fast.embed.importers.parts import find_parts, relative
from lit_fast.embed.importers.vectors import Vectors, open_vectors
from lit_fast.embed.index import check_output_directory, remove_leftovers
from lit_fast.embed.locks import lock_rows
from lit_fast.embed.shard_writer import write_shard
from lit_fast.embed.skipped import KeySet, SkippedLog
from lit_fast.embed.sources.interface import Columns, is_utf8
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, sha256, size_and_etag
from lit_fast.storage.lock import Lock, LostLockError
from lit_fast.storage.paths import StrPath, is_url, join
from lit_fast.utils.output import result
from lit_fast.utils.progress import Progress
from lit_fast.version import __version__

_GROUP_ROWS = 1 << 16  # rows whose keys are compared with the earlier ones at a time


def import_features(
    sources: StrPath | Sequence[StrPath],
    out: StrPath,
    tower: str,
    format: str = "",
    *,
    features: str = "",
    table: StrPath | None = None,
    options: Columns | None = None,
) -> None:
    """Make a dataset of the features in `sources`, or continue an unfinished one.

    Args:
      sources: files, patterns, URLs or directories.
      tower: name of the model that made them. Features of the same name and width count as features of the same
        tower, which cannot be checked.
      format: one of `lit_fast.embed.importers.parts.FORMATS`; "": guess it.
      features: name of the column or tensor with the features; "": the only one that can be.
      table: captions, one row per row of features in their order; for clip-retrieval and parquet instead of their own
        columns. A file, a pattern of files that are read one after the other, or a dataset.
      options: the columns with captions and keys.

    Raises:
      UserError: files are missing or damaged or do not fit each other, `out` holds something else, or no row has a
        usable feature.
    """
    store, options, out = check_store_name(tower), options or Columns(), os.fspath(out)
    given = [sources] if isinstance(sources, str | os.PathLike) else sources
    texts = [os.fspath(text) if is_url(text) else os.path.abspath(text) for text in given]
    tables = find_tables(table) if table else []
    for text in [*texts, *tables, out]:
        if not is_utf8(text):
            raise UserError(f"the name {text!a} is not UTF-8; rename it")
    format, parts = find_parts(texts, format, features)
    if not tables:
        check_metadata(parts)
    named = "" if not table else os.fspath(table) if is_url(table) else os.path.abspath(table)
    others = {"features": features, "captions_table": named}
    names = (*options.as_options(), *(f"{name}={value}" for name, value in others.items() if value))
    sizes = map(size_and_etag, (part.path for part in parts))
    found = [
        Source(part.path, size, "features", etag=etag, names=names)
        for part, (size, etag) in zip(parts, sizes, strict=True)
    ]
    if not exists(join(out, "dataset.json")):
        check_output_directory(out)
    with lock_rows(out) as lock:
        if exists(join(out, "dataset.json")):
            dataset = open_dataset(out)
            if dataset.sources != tuple(found):
                raise UserError(
                    f"{out} is already a dataset, of other sources or options; choose another --out"
                )
        else:
            dataset = write_index(imported_rows(parts, tables, options), found, out, lock)
        digests = [source.etag if is_url(source.path) else sha256(source.path) for source in found]
        names_below = relative([source.path for source in found])
        files = [[name, digest] for name, digest in zip(names_below, digests, strict=True)]
        imported = {
            "format": format,
            "sources": texts,
            **dict(name.partition("=")[::2] for name in names),
            "files": files,
        }
        write_store(
            Features(dataset, store, imported_provenance(store, parts[0].width, parts[0].dtype, imported)),
            lambda source: open_vectors(parts[source].path, parts[source].column),
            lock,
        )


def imported_provenance(name: str, width: int, dtype: str, imported: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `tower.json` of imported features.

    Args:
      name: of the model. Other datasets come from other files; by the name they are of the same model.
      imported: where they come from; `files` decides the identity.
    """
    first_view, identity = (
        hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
        for known in (["imported", name, width], ["imported", name, width, imported["files"]])
    )
    return {
        "name": name,
        "source": imported["sources"][0],
        "identity": identity,
        "first_view": first_view,
        "width": width,
        "dtype": dtype,
        "imported": imported,
        "versions": {"lit_fast": __version__},
    }


def write_store(features: Features, open_source: Callable[[int], Vectors], lock: Lock) -> None:
    """Write the unfinished shards of a store, and report it.

    Args:
      open_source: opens the vectors of a source of the dataset.
      lock: of the dataset.

    Raises:
      UserError: there is a store of other features, or no row has a usable feature.
    """
    if write_provenance(features):
        raise UserError(
            f"{features.path} was made of other files, or these have changed; choose another --out"
        )
    if len(features.finished()) < features.dataset.shards:
        _write_features(features, open_source, lock)
    _report(features)


def write_index(rows: Iterable[tuple[Row, str]], sources: list[Source], out: str, lock: Lock) -> Dataset:
    """Write index and captions of all rows in order, except rows with a problem or a repeated key.

    Args:
      rows: each with its problem, "" for none.
      lock: of `out`.
    """
    check_output_directory(out)
    skipped, keys = SkippedLog(), KeySet()
    writer: DatasetWriter | None = None

    def usable_rows() -> Iterator[Row]:
        for row, problem in rows:
            if problem:
                skipped.add(row.key, sources[row.source].path, problem)
            else:
                yield row

    try:
        usable = usable_rows()
        while group := list(islice(usable, _GROUP_ROWS)):
            lock.check()
            are_new = keys.add([(row.source, row.key) for row in group]).tolist()
            for row, is_new in zip(group, are_new, strict=True):
                if is_new:
                    writer = writer or DatasetWriter(out)
                    writer.add(row)
                else:
                    skipped.add(row.key, sources[row.source].path, "duplicate key")
        if writer is None:
            raise UserError(
                "; ".join(
                    [
                        f"no usable row in {sources[0].path}",
                        skipped.report() or "give at least one row of features",
                    ]
                )
            )
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


def _write_features(features: Features, open_source: Callable[[int], Vectors], lock: Lock) -> None:
    """Write the unfinished shards."""
    dataset, finished = features.dataset, set(features.finished())
    array = features.array(create=True)
    done = sum(map(features.shard_rows, finished))
    progress = Progress("import", dataset.rows, "rows", start=done)
    opened = lru_cache(maxsize=4)(open_source)
    index = dataset.index_reader()
    for shard in range(dataset.shards):
        if shard in finished:
            continue
        first, rows = shard * SHARD, features.shard_rows(shard)
        values, invalid = np.zeros((rows, features.width), BFLOAT16), dict[int, str]()
        for lo in range(0, rows, BLOCK):
            block = decode_block(index.read((first + lo) // BLOCK))
            sources, offsets = np.array(block.sources), np.array(block.offsets)
            missing: dict[int, str] = {}
            for source in np.unique(sources).tolist():
                positions = np.flatnonzero(sources == source)
                with np.errstate(over="ignore"):  # too large a value becomes infinite, and its row invalid
                    read, reasons = _read(opened(source), dataset.sources[source], offsets[positions])
                    values[lo + positions] = read.astype(np.float32).astype(BFLOAT16)
                missing |= {lo + int(positions[row]): reason for row, reason in reasons.items()}
            unusable = _invalid_rows(values[lo : lo + BLOCK])
            invalid |= {lo + row: reason for row, reason in unusable.items()} | missing
        values[list(invalid)] = 0
        lock.check()
        write_shard(features, array, shard, values, {first + row: why for row, why in invalid.items()})
        progress.advance(rows)
    progress.close()


def _read(vectors: Vectors, source: Source, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    if int(rows.max()) >= vectors.shape.rows:
        raise UserError(f"{source.path} has changed while it was read; rerun the same command")
    return vectors.read(rows)


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
            f"fix the cause, then delete {dataset.path} and rerun the same command"
        )
    reasons = Counter(invalid.values()).most_common(5)
    listed = f" ({', '.join(f'{count:,} {reason}' for reason, count in reasons)})" if reasons else ""
    valid = dataset.rows - len(invalid)
    result(
        f"imported {dataset.rows:,} rows with {dataset.captions:,} captions into {dataset.path}, features "
        f"{features.tower} of width {features.width}: {valid:,} valid, {len(invalid):,} invalid{listed}"
    )
