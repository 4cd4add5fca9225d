"""A dataset: a directory with a fixed, ordered list of rows that everything else is aligned to.

    D/dataset.json                     rows, seed, sources, digests of the keys; written last
    D/index/00000.array_record         record b = where the images of block b lie
    D/captions/00000.array_record      record b = the captions of block b; index-1, captions-1 once it has grown
    D/tokens/<tokenizer>/              see `lit_fast.data.tokens`
    D/features/<tower>/                see `lit_fast.data.features`

A row is one image with its captions and, in evaluation sets, a label. A block is 1024 consecutive rows
(the unit of reading), a shard 65 536 (the unit of writing, committing and sharing out).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lit_fast.data.records import RecordReader, RecordWriter
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, is_file, list_names, read_json, remove_tree, write_json
from lit_fast.storage.paths import StrPath, absolute, join
from lit_fast.storage.paths import name as last_part

BLOCK = 1024
SHARD = 65_536
FORMAT = 1


@dataclass(frozen=True)
class Source:
    """A file or directory that rows were read from, and how their images are found in it.

    | kind | `offset` and `size` of a row |
    |---|---|
    | tar | the image file's first byte in the tar, and its bytes |
    | parquet | row group, row in it; `image` is the column, dotted where it is a field of a struct |
    | array_record | record number, 0; `image` is the feature of the tf.train.Example |
    | folder | 0, the image file's bytes when indexed (0 = unknown); the file is `images` and the row's key |
    | noise | number of the picture, 0; there is no file |
    | features | row in the file, 0; its features were imported, there is no image |
    """

    path: str  # absolute, or a URL
    bytes: int  # 0 for a directory
    kind: str = "tar"
    image: str = ""
    images: str = ""  # absolute directory, or a URL
    etag: str = ""  # of a remote file, where its server gives one
    names: tuple[str, ...] = ()  # the options that chose columns when it was indexed


@dataclass(frozen=True)
class Row:
    """One image with its captions: where it lies in the sources and what it is called."""

    key: str
    source: int  # index into Dataset.sources
    offset: int  # what it means depends on the kind of the source
    size: int
    captions: tuple[str, ...]
    label: int = -1  # class number, -1 = none
    languages: tuple[str, ...] = ()  # empty, or one per caption ("" = unknown)


@dataclass(frozen=True)
class Block:
    """The index record of one block: equally long columns, one entry per row."""

    keys: list[str]
    sources: list[int]
    offsets: list[int]
    sizes: list[int]
    captions: list[int]  # how many captions the row has
    labels: list[int]
    languages: list[list[str]] = field(default_factory=list)  # empty if no row of the block has any

    def encode(self) -> bytes:
        """JSON, columnar."""
        columns = {name: column for name, column in self.__dict__.items() if name != "languages" or column}
        return json.dumps(columns, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says; rows are read on demand, block by block."""

    path: str
    rows: int
    captions: int  # in all rows together
    captionless: int  # rows without one
    labelled: int  # rows with a label
    seed: int
    sources: tuple[Source, ...]
    shard_keys: tuple[str, ...]  # per shard: blake2b-128 of its keys
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()  # zero-shot prompts; "{c}" stands for the class name
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows that are not in the dataset
    languages: dict[str, int] = field(default_factory=dict)  # code -> captions
    generation: int = 0  # how often it has grown

    @property
    def name(self) -> str:
        """The directory's name."""
        return last_part(absolute(self.path))

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
        return RecordReader(generation_directory(self.path, "index", self.generation), self.blocks)

    def captions_reader(self) -> RecordReader:
        """Reader of the caption records; decode with `decode_captions`."""
        return RecordReader(generation_directory(self.path, "captions", self.generation), self.blocks)

    def iter_blocks(self) -> Iterator[Block]:
        """All index blocks in order."""
        reader = self.index_reader()
        for b in range(self.blocks):
            yield decode_block(reader.read(b))

    def prefix_digest(self, shard: int, rows: int) -> str:
        """Digest of the first `rows` keys of a shard, as `shard_keys` had it when the shard was that short."""
        reader, first = self.index_reader(), shard * SHARD
        rows = min(rows, self.rows - first)
        keys: list[str] = []
        for b in range(first // BLOCK, -(-(first + rows) // BLOCK)):
            keys += decode_block(reader.read(b)).keys
        return _digest(keys[:rows])

    def iter_captions(self) -> Iterator[list[list[str]]]:
        """All caption blocks in order: per row its captions."""
        reader = self.captions_reader()
        for b in range(self.blocks):
            yield decode_captions(reader.read(b))


def generation_directory(path: StrPath, name: str, generation: int) -> str:
    """Where the records `name` ("index" or "captions") of a generation of the dataset at `path` lie."""
    return join(path, f"{name}-{generation}" if generation else name)


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


def open_dataset(path: StrPath) -> Dataset:
    """Open a dataset; reads only `dataset.json`.

    Raises:
      UserError: there is no complete dataset at `path`.
    """
    path = os.fspath(path)
    if not exists(path):
        raise UserError(f"dataset {path} does not exist; make it with: lit-fast index SOURCE... --out {path}")
    file = join(path, "dataset.json")
    if not is_file(file):
        raise UserError(f"{path} is not a dataset (no dataset.json); make it with: lit-fast index")
    value = read_json(file)
    try:
        if value["format"] != FORMAT:
            raise UserError(f"{file} has format {value['format']}, this version reads {FORMAT}")
        if (value["block"], value["shard"]) != (BLOCK, SHARD):
            raise UserError(f"{file} has blocks of {value['block']} and shards of {value['shard']} rows")
        dataset = Dataset(
            path=path,
            rows=value["rows"],
            captions=value["captions"],
            captionless=value["captionless"],
            labelled=value["labelled"],
            seed=value["seed"],
            sources=tuple(_source(s) for s in value["sources"]),
            shard_keys=tuple(value["shard_keys"]),
            classnames=tuple(value["classnames"]),
            templates=tuple(value["templates"]),
            left_out=dict(value["left_out"]),
            languages=dict(value.get("languages", {})),
            generation=value.get("generation", 0),
        )
        _check(dataset)
        return dataset
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__} {error}") from None


def _source(value: dict[str, Any]) -> Source:
    return Source(**value | {"names": tuple(value.get("names", ()))})


def _check(dataset: Dataset) -> None:
    """Refuse a dataset.json that was edited by hand or damaged; the `ValueError` says what is wrong."""
    counts = [dataset.rows, dataset.captions, dataset.captionless, dataset.labelled, dataset.generation]
    counts += [dataset.seed, *dataset.left_out.values(), *dataset.languages.values()]
    texts = [*dataset.shard_keys, *dataset.classnames, *dataset.templates, *dataset.languages]
    for source in dataset.sources:
        counts.append(source.bytes)
        texts += [source.path, source.kind, source.image, source.images, source.etag, *source.names]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a count is not a whole number")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name is not a text")
    "".join(texts).encode()  # lone surrogates cannot be a path either
    if len(dataset.shard_keys) != dataset.shards:
        raise ValueError(f"{len(dataset.shard_keys)} digests of keys for {dataset.shards} shards")


class DatasetWriter:
    """Writes rows in their final order. The dataset exists once `finish` has returned.

    With `grow`, a dataset at the same path, the rows follow after its rows. They are written to a new
    generation of the records beside the old one, which `finish` removes after `dataset.json` has changed
    over: a kill leaves either the old dataset or the new one.
    """

    def __init__(self, path: StrPath, *, grow: Dataset | None = None) -> None:
        self._path, self._grow = os.fspath(path), grow
        self.rows = self.captions = self.captionless = self.labelled = 0
        self.languages: Counter[str] = Counter()
        self._block: list[Row] = []
        self._keys: list[str] = []
        self._shard_keys: list[str] = []
        generation = grow.generation + 1 if grow else 0
        whole = grow.rows // BLOCK if grow else 0
        self._index, self._captions = (
            RecordWriter(
                generation_directory(path, name, generation),
                after=generation_directory(path, name, generation - 1) if grow else None,
                count=whole,
            )
            for name in ("index", "captions")
        )
        if grow:
            self._take_over(grow, whole)

    def _take_over(self, old: Dataset, whole: int) -> None:
        """Count the rows of the `whole` full blocks, and add those of a short last block once more."""
        last = list(_rows(old, whole)) if whole < old.blocks else []
        self.rows = whole * BLOCK
        self.captions = old.captions - sum(len(r.captions) for r in last)
        self.captionless = old.captionless - sum(not r.captions for r in last)
        self.labelled = old.labelled - sum(r.label >= 0 for r in last)
        self.languages.update(old.languages)
        self.languages.subtract(Counter(l for r in last for l in r.languages))
        shards = self.rows // SHARD
        self._shard_keys = list(old.shard_keys[:shards])
        reader = old.index_reader()
        for b in range(shards * SHARD // BLOCK, whole):
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
            languages=[list(r.languages) for r in rows] if any(r.languages for r in rows) else [],
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
        sources: Sequence[Source],
        classnames: Sequence[str] = (),
        templates: Sequence[str] = (),
        left_out: dict[str, int] | None = None,
    ) -> Dataset:
        """Write the rest and, last, `dataset.json`; `sources` are all, those of the grown dataset first."""
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
            "languages": {l: n for l, n in sorted(self.languages.items()) if l and n},
            "generation": self._grow.generation + 1 if self._grow else 0,
            "sources": [_told(source) for source in sources],
            "shard_keys": self._shard_keys,
        }
        write_json(join(self._path, "dataset.json"), value)
        dataset = open_dataset(self._path)
        remove_other_generations(dataset)
        return dataset


def remove_other_generations(dataset: Dataset) -> None:
    """Delete the records that killed or finished growing has left beside those of the dataset."""
    for name in ("index", "captions"):
        current = generation_directory(dataset.path, name, dataset.generation)
        for other in list_names(dataset.path):
            directory = join(dataset.path, other)
            if (other == name or other.startswith(f"{name}-")) and directory != current:
                remove_tree(directory)


def _told(source: Source) -> dict[str, Any]:
    """A source as JSON, without what says nothing."""
    return {name: value for name, value in asdict(source).items() if value or name == "bytes"}


def _rows(dataset: Dataset, number: int) -> Iterator[Row]:
    """The rows of one block as they were added."""
    block = decode_block(dataset.index_reader().read(number))
    captions = decode_captions(dataset.captions_reader().read(number))
    languages = block.languages or [[] for _ in block.keys]
    for i, key in enumerate(block.keys):
        yield Row(
            key,
            block.sources[i],
            block.offsets[i],
            block.sizes[i],
            tuple(captions[i]),
            block.labels[i],
            tuple(languages[i]),
        )
