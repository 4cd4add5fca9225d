"""Read a dataset: a directory with a fixed, ordered list of rows; everything else in it is aligned to these rows.

    D/dataset.json                     rows, seed, sources, digests of the keys; written last
    D/index/00000.array_record         record b = the places of the images of block b
    D/captions/00000.array_record      record b = the captions of block b
    D/tokens/<tokenizer>/              see `lit_fast.data.tokens`
    D/features/<tower>/                see `lit_fast.data.features`

A row is one image with its captions and, in evaluation sets, a label. A block is 1024 consecutive rows, the unit of
reading. A shard is 65 536 rows, the unit of writing, committing and sharing between processes. Each time a dataset
grows, its index and captions move to a new generation of directories: index-1, captions-1.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from lit_fast.data.records import RecordReader
from lit_fast.errors import UserError
from lit_fast.storage import paths
from lit_fast.storage.files import exists, is_file
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_json

BLOCK = 1024
SHARD = 65_536
FORMAT = 1


@dataclass(frozen=True)
class Source:
    """A file or directory that rows were read from, and how to find their images in it.

    | kind | `offset` and `size` of a row |
    |---|---|
    | tar | first byte of the image file in the tar, and its number of bytes |
    | parquet | row group, and row in it; `image` is the column, dotted for a field of a struct |
    | array_record | record number, 0; `image` is the feature of the tf.train.Example |
    | tfrecord | first byte of the record's data in the file, and its number of bytes; `image` as above |
    | folder | 0, bytes of the image file when it was indexed (0 = unknown); the file is `images` and the row's key |
    | noise | number of the image, 0; there is no file |
    | features | row in the file, 0; its features were imported, there is no image |
    """

    path: str  # absolute, or a URL
    bytes: int  # 0 for a directory
    kind: str = "tar"
    image: str = ""
    images: str = ""  # absolute directory, or a URL
    etag: str = ""  # of a remote file, if its server gives one
    modified: int = 0  # time of a local file in nanoseconds
    digest: str = (
        ""  # of a local file, or of a remote one without an ETag: see lit_fast.data.images.fingerprint
    )
    names: tuple[str, ...] = ()  # options of `index` that chose columns


@dataclass(frozen=True)
class Block:
    """The index record of one block: equally long columns, one entry per row."""

    keys: Sequence[str]
    sources: Sequence[int]  # indices into Dataset.sources
    offsets: Sequence[int]  # the meaning depends on the kind of source
    sizes: Sequence[int]
    captions: Sequence[int]  # number of captions
    labels: Sequence[int]  # class number; -1: none
    languages: Sequence[Sequence[str]] = ()  # empty if no row of the block has any
    checks: Sequence[int] = ()  # checksums of the images; empty if no row of the block has one

    def encode(self) -> bytes:
        """Return JSON, by column."""
        return compact_json({name: column for name, column in vars(self).items() if column})

    def check(self, i: int) -> int:
        """Return the checksum of an image, see `lit_fast.data.images.fingerprint`; 0: it has none."""
        return self.checks[i] if self.checks else 0


@dataclass(frozen=True)
class Dataset:
    """The content of `dataset.json`; rows are read on demand, block by block."""

    path: str
    rows: int
    captions: int  # of all rows
    captionless: int  # rows without a caption
    labelled: int  # rows with a label
    seed: int
    sources: tuple[Source, ...]
    shard_keys: tuple[str, ...]  # blake2b-128 of the keys of each shard
    classnames: tuple[str, ...]
    templates: tuple[str, ...]  # zero-shot prompts; "{c}" is replaced by the class name
    left_out: dict[str, int]  # reason -> rows of the sources that are not in the dataset
    languages: dict[str, int]  # code -> captions
    generation: int  # number of times that it has grown

    @property
    def name(self) -> str:
        """Name of the directory."""
        return paths.name(paths.absolute(self.path))

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
        """Identity of the ordered list of rows."""
        return digest_texts(self.shard_keys)

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """The shortest ends of the sources' paths that differ, as in `cc3m/00000.tar` and `cc12m/00000.tar`."""
        return shortest_names([source.path for source in self.sources])

    def row_name(self, block: Block, i: int) -> str:
        """Return the key of row `i` of a block, with its source where the dataset has several."""
        key, source = block.keys[i], block.sources[i]
        return f"{key} in {self.source_names[source]}" if len(self.sources) > 1 else key

    def index_reader(self) -> RecordReader:
        """Return a reader of the index records; decode them with `decode_block`."""
        return RecordReader(generation_directory(self.path, "index", self.generation), self.blocks)

    def captions_reader(self) -> RecordReader:
        """Return a reader of the caption records; decode them with `decode_captions`."""
        return RecordReader(generation_directory(self.path, "captions", self.generation), self.blocks)

    def iter_blocks(self) -> Iterator[Block]:
        """Yield all index blocks in order."""
        reader = self.index_reader()
        for b in range(self.blocks):
            yield decode_block(reader.read(b))

    def iter_captions(self) -> Iterator[list[list[str]]]:
        """Yield all caption blocks in order: the captions of each row."""
        reader = self.captions_reader()
        for b in range(self.blocks):
            yield decode_captions(reader.read(b))

    def prefix_digest(self, shard: int, rows: int) -> str:
        """Return the digest of the first `rows` keys of a shard: the `shard_keys` of a dataset that ended there."""
        reader, first = self.index_reader(), shard * SHARD
        rows = min(rows, self.rows - first)
        keys: list[str] = []
        for b in range(first // BLOCK, -(-(first + rows) // BLOCK)):
            keys += decode_block(reader.read(b)).keys
        return digest_texts(keys[:rows])


def shortest_names(locations: Sequence[str]) -> tuple[str, ...]:
    """Return for each path or URL its last parts, as few as make it differ from all others."""
    parts = [location.split("/") for location in locations]
    names, depth = [""] * len(parts), 1
    unnamed = list(range(len(parts)))
    while unnamed:
        ends = {i: "/".join(parts[i][-depth:]) for i in unnamed}
        counts = Counter(ends.values())
        for i, end in ends.items():
            names[i] = end
        unnamed = [i for i, end in ends.items() if counts[end] > 1 and depth < len(parts[i])]
        depth += 1
    return tuple(names)


def generation_directory(path: StrPath, name: str, generation: int) -> str:
    """Return the directory of the records `name`, "index" or "captions", of a generation of the dataset at `path`."""
    return join(path, f"{name}-{generation}" if generation else name)


def compact_json(value: Any) -> bytes:
    """Return UTF-8 JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def decode_block(record: bytes) -> Block:
    """Invert `Block.encode`."""
    return Block(**json.loads(record))


def compact_block(record: bytes) -> Block:
    """Return the part of a block that reading images needs: without captions, labels and languages."""
    block = decode_block(record)
    sources, offsets, sizes, checks = (
        array("q", column) for column in (block.sources, block.offsets, block.sizes, block.checks)
    )
    return Block(_Texts(block.keys), sources, offsets, sizes, (), (), checks=checks)


class _Texts(Sequence[str]):
    """Texts in one piece of memory; a text of 10 letters takes 14 bytes instead of 67."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._data = b"".join(encoded)
        self._ends = array("I", itertools.accumulate(map(len, encoded)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self._data[self._ends[i - 1] if i else 0 : self._ends[i]].decode("utf-8", "surrogatepass")


def decode_captions(record: bytes) -> list[list[str]]:
    """Return the captions of each row of a block, in the order of the source."""
    return json.loads(record)


def digest_texts(texts: Sequence[str]) -> str:
    """Return the blake2b-128 of a list of texts with their lengths."""
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
            raise UserError(
                f"{file} has format {value['format']}, this version reads {FORMAT}; update lit-fast"
            )
        if (value["block"], value["shard"]) != (BLOCK, SHARD):
            raise UserError(
                f"{file} has blocks of {value['block']} and shards of {value['shard']} rows; index the sources again"
            )
        record = {f.name: value[f.name] for f in fields(Dataset) if f.name != "path"}
        record["sources"] = [Source(**s | {"names": tuple(s.get("names", ()))}) for s in record["sources"]]
        lists = {name: tuple(record[name]) for name in ("sources", "shard_keys", "classnames", "templates")}
        dataset = Dataset(path=path, **record | lists)
        _validate(dataset)
        return dataset
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__} {error}; restore it") from None


def choose_store(dataset: Dataset, content: str, key: str, name: str, stored: list[str], command: str) -> str:
    """Return `name`, or the only stored name if it is empty.

    Args:
      dataset: the dataset.
      content: "features" or "tokens".
      key: configuration key that selects one.
      name: selected store.
      stored: names of the stores of the dataset.
      command: makes a store.

    Raises:
      UserError: there is no such store, or there are several and no name was given.
    """
    if not stored:
        raise UserError(f"dataset {dataset.path} has no {content}; make them with: {command}")
    known = ", ".join(stored)
    if not name and len(stored) > 1:
        raise UserError(f"dataset {dataset.path} has {content} of {known}; choose one with the key {key}")
    if name and name not in stored:
        raise UserError(
            f"dataset {dataset.path} has no {content} of {key} {name!r}, only of {known}; make them with: {command}"
        )
    return name or stored[0]


def _validate(dataset: Dataset) -> None:
    """Raise ValueError if dataset.json was edited by hand or damaged."""
    counts = [dataset.rows, dataset.captions, dataset.captionless, dataset.labelled, dataset.generation]
    counts += [dataset.seed, *dataset.left_out.values(), *dataset.languages.values()]
    texts = [*dataset.shard_keys, *dataset.classnames, *dataset.templates, *dataset.languages]
    for source in dataset.sources:
        counts += [source.bytes, source.modified]
        texts += [
            source.path,
            source.kind,
            source.image,
            source.images,
            source.etag,
            source.digest,
            *source.names,
        ]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a count is not a whole number")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name is not a text")
    "".join(texts).encode()  # raises on lone surrogates, which no path has
    if len(dataset.shard_keys) != dataset.shards:
        raise ValueError(f"{len(dataset.shard_keys)} digests of keys for {dataset.shards} shards")
