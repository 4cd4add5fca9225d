"""A dataset: a directory with a fixed, ordered list of rows that everything else is aligned to.

    D/dataset.json                     rows, seed, sources, digests of the keys; written last
    D/index/00000.array_record         record b = where the images of block b lie
    D/captions/00000.array_record      record b = the captions of block b
    D/tokens/<tokenizer>/              see `lit_fast.tokens`
    D/features/<tower>/                see `lit_fast.features`

A row is one image with its captions and, in evaluation sets, a label. A block is 1024 consecutive rows
(the unit of reading), a shard 65 536 (the unit of writing, committing and sharing out).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_fast.errors import UserError
from lit_fast.files import read_json, write_json
from lit_fast.records import RecordReader, RecordWriter

BLOCK = 1024
SHARD = 65_536
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One image with its captions: where it lies in the sources and what it is called."""

    key: str
    source: int  # index into Dataset.sources
    offset: int  # of the image file's first byte in the source
    size: int  # bytes of the image file
    captions: tuple[str, ...]
    label: int = -1  # class number, -1 = none


@dataclass(frozen=True)
class Block:
    """The index record of one block: equally long columns, one entry per row."""

    keys: list[str]
    sources: list[int]
    offsets: list[int]
    sizes: list[int]
    captions: list[int]  # how many captions the row has
    labels: list[int]

    def encode(self) -> bytes:
        """JSON, columnar."""
        return json.dumps(self.__dict__, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says; rows are read on demand, block by block."""

    path: Path
    rows: int
    captions: int  # in all rows together
    captionless: int  # rows without one
    labelled: int  # rows with a label
    seed: int
    sources: tuple[str, ...]  # absolute paths of the files that hold the images
    source_bytes: tuple[int, ...]
    shard_keys: tuple[str, ...]  # per shard: blake2b-128 of its keys
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()  # zero-shot prompts; "{c}" stands for the class name
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows that are not in the dataset

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.rows // BLOCK)

    @property
    def shards(self) -> int:
        """Number of shards; the last may be short."""
        return -(-self.rows // SHARD)

    @property
    def digest(self) -> str:
        """Identity of the ordered list of rows: a digest over the shards' digests."""
        return _digest(self.shard_keys)

    def index_reader(self) -> RecordReader:
        """Reader of the index records; decode with `decode_block`."""
        return RecordReader(self.path / "index", self.blocks)

    def captions_reader(self) -> RecordReader:
        """Reader of the caption records; decode with `decode_captions`."""
        return RecordReader(self.path / "captions", self.blocks)

    def iter_blocks(self) -> Iterator[Block]:
        """All index blocks in order."""
        reader = self.index_reader()
        for b in range(self.blocks):
            yield decode_block(reader.read(b))

    def iter_captions(self) -> Iterator[list[list[str]]]:
        """All caption blocks in order: per row its captions."""
        reader = self.captions_reader()
        for b in range(self.blocks):
            yield decode_captions(reader.read(b))


def decode_block(record: bytes) -> Block:
    """The inverse of `Block.encode`."""
    return Block(**json.loads(record))


def decode_captions(record: bytes) -> list[list[str]]:
    """Captions of one block: a list per row, in the order of the source."""
    return json.loads(record)


def _digest(texts: Sequence[str]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        hasher.update(len(data).to_bytes(4, "little") + data)
    return hasher.hexdigest()


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset; reads only `dataset.json`.

    Raises:
      UserError: there is no complete dataset at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"dataset {path} does not exist; make it with: lit-fast index SOURCE... --out {path}")
    file = path / "dataset.json"
    if not file.is_file():
        raise UserError(f"{path} is not a dataset (no dataset.json); make it with: lit-fast index")
    value = read_json(file)
    try:
        if value["format"] != FORMAT:
            raise UserError(f"{file} has format {value['format']}, this version reads {FORMAT}")
        if (value["block"], value["shard"]) != (BLOCK, SHARD):
            raise UserError(f"{file} has blocks of {value['block']} and shards of {value['shard']} rows")
        return Dataset(
            path=path,
            rows=value["rows"],
            captions=value["captions"],
            captionless=value["captionless"],
            labelled=value["labelled"],
            seed=value["seed"],
            sources=tuple(s["path"] for s in value["sources"]),
            source_bytes=tuple(s["bytes"] for s in value["sources"]),
            shard_keys=tuple(value["shard_keys"]),
            classnames=tuple(value["classnames"]),
            templates=tuple(value["templates"]),
            left_out=dict(value["left_out"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__} {error}") from None


class DatasetWriter:
    """Writes rows in their final order. The dataset exists once `finish` has returned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = RecordWriter(path / "index")
        self._captions = RecordWriter(path / "captions")
        self._block: list[Row] = []
        self._keys: list[str] = []
        self._shard_keys: list[str] = []
        self.rows = self.captions = self.captionless = self.labelled = 0

    def add(self, row: Row) -> None:
        """Append one row."""
        self._block.append(row)
        self._keys.append(row.key)
        self.rows += 1
        self.captions += len(row.captions)
        self.captionless += not row.captions
        self.labelled += row.label >= 0
        if len(self._block) == BLOCK:
            self._write_block()
        if len(self._keys) == SHARD:
            self._write_shard()

    def _write_block(self) -> None:
        rows, self._block = self._block, []
        block = Block(
            keys=[r.key for r in rows],
            sources=[r.source for r in rows],
            offsets=[r.offset for r in rows],
            sizes=[r.size for r in rows],
            captions=[len(r.captions) for r in rows],
            labels=[r.label for r in rows],
        )
        self._index.write(block.encode())
        captions = [r.captions for r in rows]
        self._captions.write(json.dumps(captions, separators=(",", ":"), ensure_ascii=False).encode())

    def _write_shard(self) -> None:
        keys, self._keys = self._keys, []
        self._shard_keys.append(_digest(keys))

    def finish(
        self,
        *,
        seed: int,
        sources: Sequence[tuple[str, int]],
        classnames: Sequence[str] = (),
        templates: Sequence[str] = (),
        left_out: dict[str, int] | None = None,
    ) -> Dataset:
        """Write the rest and, last, `dataset.json`. `sources` are (absolute path, bytes)."""
        if self._block:
            self._write_block()
        if self._keys:
            self._write_shard()
        self._index.close()
        self._captions.close()
        value: dict[str, Any] = {
            "format": FORMAT,
            "rows": self.rows,
            "captions": self.captions,
            "captionless": self.captionless,
            "labelled": self.labelled,
            "block": BLOCK,
            "shard": SHARD,
            "seed": seed,
            "digest": _digest(self._shard_keys),
            "classnames": list(classnames),
            "templates": list(templates),
            "left_out": left_out or {},
            "sources": [{"path": path, "bytes": size} for path, size in sources],
            "shard_keys": self._shard_keys,
        }
        write_json(self._path / "dataset.json", value)
        return open_dataset(self._path)
