"""Token ids of a dataset's captions for one tokenizer.

    D/tokens/<name>/tokenizer.model          sentencepiece
    D/tokens/<name>/tokens.json              rules, counts, digests; written last
    D/tokens/<name>/00000.array_record       record b = the ragged ids of block b

Rules (big_vision, pp/ops_text.py): ASCII lower-casing; the end-of-sentence id is appended and survives
truncation ("sticky"); padding is the end-of-sentence id again, so that the last position always holds it, or
another id (SigLIP 2 pads with 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.data.records import RecordReader
from lit_fast.data.tokenizer import Tokenizer, load_tokenizer
from lit_fast.errors import UserError
from lit_fast.storage.files import is_file, list_names, read_object
from lit_fast.storage.paths import join


def encode_record(captions: Sequence[Sequence[Sequence[int]]], vocab_size: int) -> bytes:
    """One block of rows, each with its captions' ids, as bytes.

    Little-endian: three uint32 (rows, captions, ids), uint32 captions per row, uint32 ids per caption,
    then all ids as uint16, or uint32 for vocabularies above 65 536.
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
    """The inverse, padded: captions per row uint32 [rows] and ids [captions, max_length]."""
    rows, captions, _ = np.frombuffer(record, "<u4", 3)
    counts = np.frombuffer(record, "<u4", rows, 12)
    lengths = np.frombuffer(record, "<u4", captions, 12 + 4 * rows)
    ids = np.frombuffer(record, id_dtype(vocab_size), offset=int(12 + 4 * rows + 4 * captions))
    out = np.full((int(captions), max_length), pad_id, ids.dtype)
    out[np.arange(max_length) < lengths[:, None]] = ids
    return counts, out


def id_dtype(vocab_size: int) -> np.dtype:
    """Smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


_META = ("identity", "vocab_size", "max_length", "pad_id", "shard_keys")


@dataclass(frozen=True)
class Tokens:
    """A token store over a dataset."""

    dataset: Dataset
    name: str
    meta: dict[str, Any]  # tokens.json

    @property
    def path(self) -> str:
        """`D/tokens/<name>`."""
        return join(self.dataset.path, "tokens", self.name)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
          UserError: tokenizer.model is missing or is not the one that made the ids.
        """
        meta = self.meta
        tokenizer = load_tokenizer(join(self.path, "tokenizer.model"), meta["max_length"], meta["pad_id"])
        if tokenizer.identity != meta["identity"]:
            raise UserError(
                f"{self.path}/tokenizer.model is not the tokenizer that made the tokens beside it"
            )
        return tokenizer

    def reader(self) -> RecordReader:
        """Reader of the blocks' records; decode with `decode`."""
        return RecordReader(self.path, self.dataset.blocks)

    def decode(self, record: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Captions per row uint32 [rows] and padded ids [captions, max_length] of one block."""
        meta = self.meta
        return decode_record(record, meta["vocab_size"], meta["max_length"], meta["pad_id"])


def stored_tokenizers(dataset: Dataset) -> list[str]:
    """Names of the complete token stores of a dataset, sorted."""
    folder = join(dataset.path, "tokens")
    return [name for name in list_names(folder) if is_file(join(folder, name, "tokens.json"))]


def open_tokens(dataset: Dataset, name: str = "") -> Tokens:
    """Open the tokens of `name`; with an empty name, the only ones there are.

    Raises:
      UserError: there are none, several without a name, or they belong to other rows.
    """
    have = stored_tokenizers(dataset)
    remedy = f"make them with: lit-fast tokenize {dataset.path} --tokenizer FILE.model"
    if not have:
        raise UserError(f"dataset {dataset.path} has no tokens; {remedy}")
    if not name and len(have) > 1:
        raise UserError(
            f"dataset {dataset.path} has tokens {', '.join(have)}; say which with the key tokenizer"
        )
    name = name or have[0]
    if name not in have:
        raise UserError(f"dataset {dataset.path} has no tokens {name!r}, only {', '.join(have)}; {remedy}")
    file = join(dataset.path, "tokens", name, "tokens.json")
    meta = read_object(
        file, *_META, identity=str, vocab_size=int, max_length=int, pad_id=int, shard_keys=list, truncated=int
    )
    tokens = Tokens(dataset, name, meta)
    if tuple(tokens.meta["shard_keys"]) != dataset.shard_keys:
        raise UserError(
            f"{tokens.path} was made from other rows than {dataset.path} has, which may have grown; make it anew "
            f"with: lit-fast tokenize {dataset.path} --tokenizer {tokens.path}/tokenizer.model --name {name} "
            f"--max-length {tokens.meta['max_length']} --pad-id {tokens.meta['pad_id']}"
        )
    return tokens
