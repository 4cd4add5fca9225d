"""Convert captions to token ids with SentencePiece.

Rules (big_vision, pp/ops_text.py): ASCII letters are lower-cased. The end-of-sentence id is appended and is kept when
the text is truncated ("sticky"). Padding is the end-of-sentence id, so that the last position always holds it, or
another id (0 in SigLIP 2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sentencepiece

from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.files import read_bytes
from lit_fast.storage.paths import StrPath


@dataclass(frozen=True)
class Tokenizer:
    """A sentencepiece model with a maximum length and a padding id."""

    model: bytes
    max_length: int
    padding: int | None = None  # id; None: end-of-sentence

    def __post_init__(self) -> None:
        if self.eos_id < 0:
            raise UserError(
                "the sentencepiece model has no end-of-sentence piece, which ends and pads captions; use another model"
            )
        if self.max_length < 2:
            raise UserError(
                f"max_length {self.max_length} is too short for a token and end-of-sentence; use 2 or more"
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise UserError(
                f"padding id {self.padding} is not one of the {self.vocab_size} pieces; use 0 to {self.vocab_size - 1}"
            )

    @cached_property
    def _processor(self) -> Any:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self.model)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"not a sentencepiece model ({first_line(error)}); give a .model file") from None
        return processor

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()

    @property
    def eos_id(self) -> int:
        """Id of the end of sentence."""
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        """Id that fills the positions after the end of sentence."""
        return self.eos_id if self.padding is None else self.padding

    def text_ids(self) -> np.ndarray:
        """Return the ids int64 [n] of the pieces of text, without special pieces and padding."""
        special = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        ids = range(self.vocab_size)
        return np.array([i for i in ids if i != self.pad_id and not any(s(i) for s in special)], np.int64)

    @property
    def identity(self) -> str:
        """Digest of the model file and the rules; equal identities give equal ids."""
        pad = "eos" if self.pad_id == self.eos_id else self.pad_id
        rules = json.dumps({"lower": "ascii", "eos": "sticky", "pad": pad, "max_length": self.max_length})
        return hashlib.blake2b(self.model + rules.encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the ids of each text, at most `max_length` with end-of-sentence last, and the number of cut texts."""
        ids = self._processor.encode([lower(text) for text in texts])
        eos, keep = self.eos_id, self.max_length - 1
        return [[*i[:keep], eos] for i in ids], sum(len(i) > keep for i in ids)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return padded ids int32 [n, max_length]."""
        out = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        for row, ids in zip(out, self.encode(texts)[0], strict=True):
            row[: len(ids)] = ids
        return out


def lower(text: str) -> str:
    """Lower-case ASCII letters only, as TensorFlow's op does by default."""
    return text.encode("utf-8", "replace").lower().decode("utf-8")


def load_tokenizer(location: StrPath, max_length: int, padding: int | None = None) -> Tokenizer:
    """Read a sentencepiece model.

    Raises:
      UserError: the file is missing, is not a sentencepiece model, or has no end-of-sentence piece or piece `padding`.
    """
    try:
        model = read_bytes(location)
    except OSError as error:
        raise unreadable(f"tokenizer {location}", error) from None
    try:
        return Tokenizer(model, max_length, padding)
    except UserError as error:
        raise UserError(f"tokenizer {location}: {error}") from None


def load_recorded_tokenizer(location: StrPath, record: dict[str, Any]) -> Tokenizer:
    """Read the sentencepiece model that a `tokens.json` records.

    Raises:
      UserError: the file is missing or another model.
    """
    tokenizer = load_tokenizer(location, record["max_length"], record["pad_id"])
    if tokenizer.identity != record["identity"]:
        raise UserError(f"{location} is not the tokenizer that tokens.json records; restore it")
    return tokenizer
