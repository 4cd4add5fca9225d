"""SentencePiece tokenizer with sticky end-of-sentence and padding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece

from lit_fast.errors import UserError
from lit_fast.storage.files import read_bytes
from lit_fast.storage.paths import StrPath


@dataclass(frozen=True)
class Tokenizer:
    """A sentencepiece model with the rules above."""

    model: bytes
    max_length: int
    padding: int | None = None  # id; None: end-of-sentence

    def __post_init__(self) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self.model)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"not a sentencepiece model: {error}") from None
        if processor.eos_id() < 0:
            raise UserError(
                "the sentencepiece model has no end-of-sentence piece, which pads and ends captions"
            )
        if self.max_length < 2:
            raise UserError(f"max_length {self.max_length} leaves no room for a token before end-of-sentence")
        if not 0 <= (self.padding or 0) < processor.get_piece_size():
            raise UserError(
                f"padding id {self.padding} is not one of the {processor.get_piece_size()} pieces"
            )
        object.__setattr__(self, "_processor", processor)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.get_piece_size()  # type: ignore[attr-defined]

    @property
    def eos_id(self) -> int:
        """End of sentence."""
        return self._processor.eos_id()  # type: ignore[attr-defined]

    @property
    def pad_id(self) -> int:
        """What follows the end of sentence up to `max_length`."""
        return self.eos_id if self.padding is None else self.padding

    def text_ids(self) -> np.ndarray:
        """Ids int64 [n] of the pieces that stand for text: neither special nor padding."""
        special = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)  # type: ignore[attr-defined]
        ids = range(self.vocab_size)
        return np.array([i for i in ids if i != self.pad_id and not any(s(i) for s in special)], np.int64)

    @property
    def identity(self) -> str:
        """Digest of the model file and the rules: equal identities give equal ids."""
        pad = "eos" if self.pad_id == self.eos_id else self.pad_id
        rules = json.dumps({"lower": "ascii", "eos": "sticky", "pad": pad, "max_length": self.max_length})
        return hashlib.blake2b(self.model + rules.encode(), digest_size=16).hexdigest()

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Ids per text, at most `max_length` with end-of-sentence last, and how many texts were cut."""
        ids = self._processor.encode([lower(text) for text in texts])  # type: ignore[attr-defined]
        eos, keep = self.eos_id, self.max_length - 1
        return [[*i[:keep], eos] for i in ids], sum(len(i) > keep for i in ids)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Ids as int32 [n, max_length], padded."""
        out = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        for row, ids in zip(out, self.encode(texts)[0], strict=True):
            row[: len(ids)] = ids
        return out


def lower(text: str) -> str:
    """Lower-case ASCII letters only, as TensorFlow's op does by default: accented capitals survive."""
    return text.encode("utf-8", "replace").lower().decode("utf-8")


def load_tokenizer(path: StrPath, max_length: int, padding: int | None = None) -> Tokenizer:
    """Read a sentencepiece model.

    Raises:
      UserError: the file is missing or is not a sentencepiece model with an end-of-sentence piece, or has no
        piece `padding`.
    """
    try:
        model = read_bytes(path)
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    try:
        return Tokenizer(model, max_length, padding)
    except UserError as error:
        raise UserError(f"tokenizer {path}: {error}") from None
