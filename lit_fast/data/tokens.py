"""Token ids of a dataset's captions for one tokenizer.

D/tokens/<name>/tokenizer.model          sentencepiece
D/tokens/<name>/tokens.json              rules, counts, digests; written last
D/tokens/<name>/00000.array_record       record b = the ragged ids of block b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset, choose_store
from lit_fast.data.records import RecordReader
from lit_fast.data.tokenizer import Tokenizer, load_recorded_tokenizer
from lit_fast.errors import UserError
from lit_fast.storage.files import is_file, list_names
from lit_fast.storage.paths import join
from lit_fast.storage.text_files import read_object


def encode_record(captions: Sequence[Sequence[Sequence[int]]], vocab_size: int) -> bytes:
    """Encode the ids of one block: a list of captions per row, a list of ids per caption.

    Little-endian: three uint32 (rows, captions, ids), uint32 captions per row, uint32 ids per caption, then all ids
    as uint16, or uint32 for vocabularies above 65 536.
    """
    flat = [ids for row in captions for ids in row]
    dtype = id_dtype(vocab_size)
    parts = [
        np.array([len(captions), len(flat), sum(map(len, flat))], "<u4"),
        np.array([len(row) for row in captions], "<u4"),
        np.array([len(ids) for ids in flat], "<u4"),
        np.fromiter((i for ids in flat for i in ids), dtype),
    ]
    return b"".join(p.tobytes() for p in parts)


def decode_record(
    record: bytes, vocab_size: int, max_length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Invert `encode_record`: return captions per row uint32 [rows] and padded ids [captions, max_length]."""
    rows, captions, _ = np.frombuffer(record, "<u4", 3)
    counts = np.frombuffer(record, "<u4", rows, 12)
    lengths = np.frombuffer(record, "<u4", captions, 12 + 4 * rows)
    ids = np.frombuffer(record, id_dtype(vocab_size), offset=int(12 + 4 * rows + 4 * captions))
    out = np.full((int(captions), max_length), pad_id, ids.dtype)
    out[np.arange(max_length) < lengths[:, None]] = ids
    return counts, out


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Tokens:
    """A token store of a dataset."""

    dataset: Dataset
    name: str
    meta: dict[str, Any]  # tokens.json

    @property
    def path(self) -> str:
        """`D/tokens/<name>`."""
        return join(self.dataset.path, "tokens", self.name)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the ids were made with.

        Raises:
          UserError: tokenizer.model is missing or another one.
        """
        return load_recorded_tokenizer(join(self.path, "tokenizer.model"), self.meta)

    def reader(self) -> RecordReader:
        """Return a reader of the records of all blocks; decode them with `decode`."""
        return RecordReader(self.path, self.dataset.blocks)

    def decode(self, record: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Return captions per row uint32 [rows] and padded ids [captions, max_length] of one block."""
        meta = self.meta
        return decode_record(record, meta["vocab_size"], meta["max_length"], meta["pad_id"])


def stored_tokenizers(dataset: Dataset) -> list[str]:
    """Return the names of the complete token stores of a dataset, sorted."""
    directory = join(dataset.path, "tokens")
    return [name for name in list_names(directory) if is_file(join(directory, name, "tokens.json"))]


def open_tokens(dataset: Dataset, name: str = "") -> Tokens:
    """Open the tokens of `name`; with an empty name, the only ones.

    Raises:
      UserError: there are none, or several without a name, or they belong to other rows.
    """
    command = f"lit-fast tokenize {dataset.path} --tokenizer FILE.model"
    name = choose_store(dataset, "tokens", "tokenizer", name, stored_tokenizers(dataset), command)
    meta = read_object(
        join(dataset.path, "tokens", name, "tokens.json"),
        "identity", "vocab_size", "max_length", "pad_id", "shard_keys",
        identity=str, vocab_size=int, max_length=int, pad_id=int, shard_keys=list, truncated=int,
    )  # fmt: skip
    tokens = Tokens(dataset, name, meta)
    if tuple(meta["shard_keys"]) != dataset.shard_keys:
        raise UserError(
            f"{tokens.path} was made from other rows than {dataset.path} has, which may have grown; make the tokens "
            f"again with: lit-fast tokenize {dataset.path} --tokenizer {tokens.path}/tokenizer.model --name {name} "
            f"--max-length {meta['max_length']} --pad-id {meta['pad_id']}"
        )
    return tokens
