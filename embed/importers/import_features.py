"""`lit-fast import-features`: features that another program has computed become a dataset.

Rows keep the order of the files. The index comes first, as if the rows had been indexed, then the features shard by
shard, each with its manifest last: the same command goes on where it was interrupted. Which file made a row's
feature stands in the index, so that a dataset of many files needs none of them in memory.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lit_fast.data.dataset import (
    BLOCK,
    SHARD,
    Dataset,
    DatasetWriter,
    Row,
    Source,
    decode_block,
    open_dataset,
)
from lit_fast.data.features import BFLOAT16, Features, Manifest, features_digest, first_line
from lit_fast.embed.extract import checked_name
from lit_fast.embed.importers.captions import check_metadata, imported_rows
from lit_fast.embed.importers.parts import Part, find_parts, read_pieces
from lit_fast.embed.index import check_out, remove_leftovers
from lit_fast.embed.key_set import KeySet
from lit_fast.embed.skipped import LeftOut
from lit_fast.embed.sources.items import Names, is_text
from lit_fast.errors import UserError
from lit_fast.storage.files import read_object, sha256, write_json
from lit_fast.utils.progress import Progress
from lit_fast.version import __version__

_GROUP = 1 << 16  # rows whose keys are compared with the earlier ones at a time


def import_features(
    source: Path, out: Path, tower: str, format: str, *, table: Path | None = None, names: Names | None = None
) -> None:
    """Make a dataset at `out` of the features in the directory `source`; goes on with what is there.

    Args:
      tower: name of the model that made them. What bears the same name and width counts as features of the same
        tower; nobody can check it.
      format: one of `lit_fast.embed.importers.parts.FORMATS`.
      table: captions, one row per row of features, in their order; for clip-retrieval instead of its metadata.
      names: of the columns with captions.

    Raises:
      UserError: files are missing or damaged or do not go together, `out` holds something else, or no row has a
        usable feature.
    """
    name, names = checked_name(tower), names or Names()
    if not is_text(f"{source}{out}"):
        raise UserError(f"the name {str(source)!a} or {str(out)!a} is not UTF-8; rename it")
    parts = find_parts(source, format)
    if table is None:
        check_metadata(parts)
    table = table.absolute() if table else None
    provenance = _provenance(parts, name, source.absolute(), format, table, names)
    told = (*names.told(), *([f"captions_table={table}"] if table else []))
    sources = [Source(str(p.path), p.path.stat().st_size, "features", names=told) for p in parts]
    if (out / "dataset.json").exists():
        dataset = open_dataset(out)
        if dataset.sources != tuple(sources):
            raise UserError(f"{out} is already a dataset, of other sources or options; choose another --out")
    else:
        dataset = _index(parts, sources, out, table, names)
    features = Features(dataset, name, provenance)
    _claim(features)
    if len(features.finished()) < dataset.shards:
        _write_shards(features, parts)
    _report(features)


def _provenance(
    parts: list[Part], name: str, source: Path, format: str, table: Path | None, names: Names
) -> dict[str, Any]:
    """The content of `tower.json`: what is known of the model is its name, and of the features their files."""
    width = parts[0].width
    files = [[str(part.path.relative_to(source)), sha256(part.path)] for part in parts]
    first_view, identity = (
        hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
        for known in (["imported", name, width], ["imported", name, width, files])
    )
    return {
        "name": name,
        "source": str(source),
        "identity": identity,
        # Other rows come in other files; the model is the same if the user says so.
        "first_view": first_view,
        "width": width,
        "dtype": parts[0].dtype,
        "imported": {
            "format": format,
            "captions_table": str(table or ""),
            "captions": next(iter(names.told()), "").removeprefix("captions="),
            "files": files,
        },
        "versions": {"lit_fast": __version__},
    }


def _index(parts: list[Part], sources: list[Source], out: Path, table: Path | None, names: Names) -> Dataset:
    check_out(out)
    existed, left_out, keys = out.exists(), LeftOut(), KeySet()
    writer: DatasetWriter | None = None
    group: list[Row] = []

    def write() -> None:
        nonlocal writer
        for row, fresh in zip(group, keys.add([row.key for row in group]).tolist(), strict=True):
            if fresh:
                writer = writer or DatasetWriter(out)
                writer.add(row)
            else:
                left_out.add(row.key, sources[row.source].path, "duplicate key")
        group.clear()

    try:
        for row, problem in imported_rows(parts, table, names):
            if problem:
                left_out.add(row.key, sources[row.source].path, problem)
                continue
            group.append(row)
            if len(group) == _GROUP:
                write()
        write()
        if writer is None:
            raise UserError(f"no usable row in {parts[0].path.parent}{left_out.why()}")
    except UserError:
        remove_leftovers(out, existed, None)
        raise
    left_out.write(out, 0)
    dataset = writer.finish(seed=0, sources=sources, left_out=left_out.counts)
    if left_out.counts:
        print(left_out.report())
    return dataset


def _claim(features: Features) -> None:
    """Write tower.json, or check that the one there is of the same files."""
    file = Path(features.path, "tower.json")
    if not file.exists():
        write_json(file, features.provenance)
        return
    there = read_object(file, "identity")
    if there["identity"] != features.identity:
        raise UserError(
            f"{features.path} was made of other files, or these have changed; choose another --out"
        )


def _write_shards(features: Features, parts: list[Part]) -> None:
    """Write the shards that are not there yet, each with its manifest last."""
    dataset, finished = features.dataset, set(features.finished())
    array = features.array(create=True)
    done = sum(map(features.shard_rows, finished))
    progress = Progress("import", dataset.rows, "rows", start=done)
    read = lru_cache(maxsize=4)(lambda number: _joined(parts[number]))
    index = dataset.index_reader()
    for shard in range(dataset.shards):
        if shard in finished:
            continue
        first, rows = shard * SHARD, features.shard_rows(shard)
        values, invalid = np.zeros((rows, features.width), BFLOAT16), dict[int, str]()
        for lo in range(0, rows, BLOCK):
            block = decode_block(index.read((first + lo) // BLOCK))
            numbers, places = np.array(block.sources), np.array(block.offsets)
            for number in np.unique(numbers).tolist():
                mine = np.flatnonzero(numbers == number)
                with np.errstate(over="ignore"):  # what is too large becomes infinite, and its row invalid
                    values[lo + mine] = read(number)[places[mine]].astype(np.float32).astype(BFLOAT16)
            invalid |= {lo + row: why for row, why in _invalid(values[lo : lo + BLOCK]).items()}
        values[list(invalid)] = 0
        try:
            # The future must be kept until its result is known: a dropped write is lost without a word.
            future = array[first : first + rows].write(values)
            future.result()
        except ValueError as error:
            raise UserError(f"{features.path} cannot be written: {first_line(error)}") from None
        keys, bad = dataset.shard_keys[shard], {first + row: why for row, why in invalid.items()}
        features.write_manifest(
            Manifest(shard, first, rows, keys, features.identity, bad, features_digest(values))
        )
        progress.advance(rows)
    progress.close()


def _joined(part: Part) -> np.ndarray:
    """The features of a part [rows, width]; mapped if the file holds them as one array."""
    pieces = read_pieces(part.path)
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if joined.shape != (part.rows, part.width):
        raise UserError(f"{part.path} has changed while it was read; run the same command again")
    return joined


def _invalid(values: np.ndarray) -> dict[int, str]:
    """Rows of bfloat16 [n, width] that are no features, and why; a zero has no direction."""
    wide = values.astype(np.float32)
    why = {row: "zero feature" for row in np.flatnonzero(~wide.any(axis=1)).tolist()}
    return why | {
        row: "non-finite feature" for row in np.flatnonzero(~np.isfinite(wide).all(axis=1)).tolist()
    }


def _report(features: Features) -> None:
    """The last line on stdout."""
    dataset, invalid = features.dataset, features.invalid_rows()
    if len(invalid) == dataset.rows:
        raise UserError(
            f"none of the {dataset.rows:,} rows has a usable feature (first: {next(iter(invalid.values()))}); "
            f"mend that and delete {dataset.path}"
        )
    print(
        f"imported {dataset.rows:,} rows with {dataset.captions:,} captions into {dataset.path}, features "
        f"{features.tower} of width {features.width}: {dataset.rows - len(invalid):,} valid, {len(invalid):,} invalid"
    )
