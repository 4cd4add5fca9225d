"""Write a dataset, or append rows to one, in the layout of `lit_fast.data.dataset`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from lit_fast.data.dataset import (
    BLOCK,
    FORMAT,
    SHARD,
    Block,
    Dataset,
    Source,
    compact_json,
    decode_block,
    decode_captions,
    digest_texts,
    generation_directory,
    open_dataset,
)
from lit_fast.data.records import RecordWriter
from lit_fast.storage.atomic import remove_temporary_files
from lit_fast.storage.files import list_names, remove_tree
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_json, write_json


@dataclass(frozen=True)
class Row:
    """One image with its captions."""

    key: str
    source: int  # index into Dataset.sources
    offset: int  # the meaning depends on the kind of source, see `Source`
    size: int
    captions: tuple[str, ...]
    label: int = -1  # class number; -1: none
    languages: tuple[str, ...] = ()  # empty, or one per caption ("" = unknown)
    check: int = 0  # checksum of the image, see `lit_fast.data.images.fingerprint`; 0: none


class DatasetWriter:
    """Writes rows in their final order. The dataset exists once `finish` has returned.

    With `grow`, a dataset at the same path, the rows are appended to its rows. They are written to a new generation
    of the records; `finish` removes the old one after it has replaced `dataset.json`. If the process is killed, the
    dataset is either the old or the new one.
    """

    def __init__(self, path: StrPath, *, grow: Dataset | None = None) -> None:
        self._path = os.fspath(path)
        self.rows = self.captions = self.captionless = self.labelled = 0
        self.languages: Counter[str] = Counter()
        self._block: list[Row] = []  # rows that are not written yet
        self._keys: list[str] = []  # of the current shard
        self._shard_keys: list[str] = []
        self._generation = grow.generation + 1 if grow else 0
        full_blocks = grow.rows // BLOCK if grow else 0
        self._index, self._captions = (
            RecordWriter(
                generation_directory(path, name, self._generation),
                after=generation_directory(path, name, grow.generation) if grow else None,
                count=full_blocks,
            )
            for name in ("index", "captions")
        )
        remove_temporary_files(path)
        if grow:
            self._resume_after(grow, full_blocks)

    def _resume_after(self, old: Dataset, full_blocks: int) -> None:
        """Count the rows of the full blocks, which are already copied, and add those of a short last block."""
        last = _read_rows(old, full_blocks) if full_blocks < old.blocks else []
        self.rows = full_blocks * BLOCK
        self.captions = old.captions - sum(len(r.captions) for r in last)
        self.captionless = old.captionless - sum(not r.captions for r in last)
        self.labelled = old.labelled - sum(r.label >= 0 for r in last)
        self.languages.update(old.languages)
        self.languages.subtract(Counter(l for r in last for l in r.languages))
        shards = self.rows // SHARD
        self._shard_keys = list(old.shard_keys[:shards])
        reader = old.index_reader()
        for b in range(shards * SHARD // BLOCK, full_blocks):
            self._keys += decode_block(reader.read(b)).keys
        for row in last:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append one row."""
        self._block.append(row)
        self._keys.append(row.key)
        self.rows += 1
        self.captions += len(row.captions)
        self.captionless += not row.captions
        self.labelled += row.label >= 0
        self.languages.update(row.languages)
        if len(self._block) == BLOCK:
            self._write_block()
        if len(self._keys) == SHARD:
            self._end_shard()

    def _write_block(self) -> None:
        rows, self._block = self._block, []
        block = Block(
            keys=[r.key for r in rows],
            sources=[r.source for r in rows],
            offsets=[r.offset for r in rows],
            sizes=[r.size for r in rows],
            captions=[len(r.captions) for r in rows],
            labels=[r.label for r in rows],
            languages=[list(r.languages) for r in rows] if any(r.languages for r in rows) else [],
            checks=[r.check for r in rows] if any(r.check for r in rows) else [],
        )
        self._index.write(block.encode())
        self._captions.write(compact_json([r.captions for r in rows]))

    def _end_shard(self) -> None:
        keys, self._keys = self._keys, []
        self._shard_keys.append(digest_texts(keys))

    def finish(
        self,
        *,
        seed: int,
        sources: Sequence[Source],
        classnames: Sequence[str] = (),
        templates: Sequence[str] = (),
        left_out: dict[str, int] | None = None,
    ) -> Dataset:
        """Write the remaining rows and then `dataset.json`; `sources` begin with those of the dataset that grows."""
        if self._block:
            self._write_block()
        if self._keys:
            self._end_shard()
        self._index.close()
        self._captions.close()
        value = {
            "format": FORMAT,
            "rows": self.rows,
            "captions": self.captions,
            "captionless": self.captionless,
            "labelled": self.labelled,
            "block": BLOCK,
            "shard": SHARD,
            "seed": seed,
            "digest": digest_texts(self._shard_keys),
            "classnames": list(classnames),
            "templates": list(templates),
            "left_out": left_out or {},
            "languages": {l: n for l, n in sorted(self.languages.items()) if l and n},
            "generation": self._generation,
            "sources": _source_records(sources),
            "shard_keys": self._shard_keys,
        }
        write_json(join(self._path, "dataset.json"), value)
        dataset = open_dataset(self._path)
        remove_other_generations(dataset)
        return dataset


def write_sources(dataset: Dataset) -> None:
    """Replace the sources in the `dataset.json` of a dataset by its `sources`."""
    file = join(dataset.path, "dataset.json")
    write_json(file, read_json(file) | {"sources": _source_records(dataset.sources)})


def _source_records(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(s).items() if value or name == "bytes"} for s in sources]


def other_generations(dataset: Dataset) -> list[str]:
    """Return the directories of all generations but the dataset's, which a killed or finished growth leaves."""
    found = []
    for name in ("index", "captions"):
        current = generation_directory(dataset.path, name, dataset.generation)
        for other in list_names(dataset.path):
            directory = join(dataset.path, other)
            if (other == name or other.startswith(f"{name}-")) and directory != current:
                found.append(directory)
    return found


def remove_other_generations(dataset: Dataset) -> None:
    """Delete the `other_generations`."""
    for directory in other_generations(dataset):
        remove_tree(directory)


def _read_rows(dataset: Dataset, number: int) -> list[Row]:
    """Return the rows of one block as they were added."""
    block = decode_block(dataset.index_reader().read(number))
    captions = decode_captions(dataset.captions_reader().read(number))
    languages = block.languages or [[]] * len(block.keys)
    texts = map(tuple, captions), block.labels, map(tuple, languages)
    checks = block.checks or [0] * len(block.keys)
    columns = (block.keys, block.sources, block.offsets, block.sizes, *texts, checks)
    return list(starmap(Row, zip(*columns, strict=True)))
