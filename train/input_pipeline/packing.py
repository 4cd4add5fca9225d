"""Captions side by side in the rows of the text tower, by their true lengths.

A row holds a fixed number of captions. They are dealt out by length, so that all rows come to nearly the same
sum of tokens, and the rows are hardly longer than that: the shapes never change, and hardly any padding is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.captions import read_captions

_STEP = 8  # tokens that row lengths are a multiple of
_SAMPLE = 64  # blocks of 1024 rows; rows lie in random order
_CAPTIONS = 4  # of each of their rows
_DEVIATIONS = 5  # of a batch's mean length, that rows have room for


def true_lengths(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Tokens up to and including the first end-of-sentence: ids [n, length] -> int64 [n]; all if there is none."""
    end = ids == eos_id
    first = end.argmax(axis=1)
    return np.where(end[np.arange(len(ids)), first], first + 1, ids.shape[1])


def deal(lengths: np.ndarray, pack: int) -> np.ndarray:
    """Which caption lies where: int64 [n / pack, pack] of positions in `lengths` [n].

    Round by round, from the longest to the shortest, every row gets one caption, the row with the least tokens
    the longest of the round. Depends on nothing but the lengths.
    """
    falling = np.argsort(-lengths, kind="stable").reshape(pack, -1)
    table = np.empty((falling.shape[1], pack), np.int64)
    table[:, 0] = falling[0]
    total = lengths[falling[0]]
    for place in range(1, pack):
        row = np.argsort(total, kind="stable")
        table[row, place] = falling[place]
        total[row] += lengths[falling[place]]
    return table


@dataclass(frozen=True)
class Packing:
    """Lays out the captions of each batch.

    Rows have `row_tokens` tokens. A batch that needs more gets longer ones, which compiles the step once more; of
    several processes none can know that another one needs them, so there it is an error.
    """

    pack: int  # captions in a row
    row_tokens: int
    eos_id: int
    tokens: float  # of a caption, on average
    devices: int  # of this process
    alone: bool  # whether there is no other process

    @property
    def description(self) -> str:
        """For the terminal."""
        filled = self.pack * self.tokens / self.row_tokens
        return (
            f"{self.pack} captions of {self.tokens:.1f} tokens on average share a row of {self.row_tokens}, "
            f"{1 - filled:.0%} of it padding"
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with other ids, int [rows, row_tokens], and with lengths uint16 [rows, pack] and slots.

        slots int32 [n]: where a device's captions lie, in their order, in its rows laid end to end.

        Raises:
          UserError: of several processes one needs longer rows.
        """
        ids = batch["ids"]
        lengths = true_lengths(ids, self.eos_id)
        of_devices = lengths.reshape(self.devices, -1)
        tables = np.stack([deal(one, self.pack) for one in of_devices])
        size = np.stack([one[table] for one, table in zip(of_devices, tables, strict=True)])
        texts = of_devices.shape[1]
        slots = np.empty((self.devices, texts), np.int32)
        np.put_along_axis(
            slots, tables.reshape(self.devices, -1), np.arange(texts, dtype=np.int32)[None], axis=1
        )
        order = (tables + np.arange(self.devices)[:, None, None] * texts).ravel()
        size = size.reshape(-1, self.pack)
        tokens = self._row_tokens(int(size.sum(axis=1).max()))
        begin = np.cumsum(size, axis=1) - size + np.arange(len(size))[:, None] * tokens
        inside = np.arange(ids.shape[1]) < lengths[order, None]
        packed = np.full(len(size) * tokens, self.eos_id, ids.dtype)
        packed[(begin.reshape(-1, 1) + np.arange(ids.shape[1]))[inside]] = ids[order][inside]
        return batch | {
            "ids": packed.reshape(len(size), tokens),
            "lengths": size.astype(np.uint16),
            "slots": slots.ravel(),
        }

    def _row_tokens(self, need: int) -> int:
        tokens = self.row_tokens
        if need > tokens and not self.alone:
            raise UserError(
                f"the captions of a batch need rows of {need} tokens, more than the {tokens} that were foreseen; "
                f"go on with --text.row_tokens {_rounded(need * 17 / 16)}"
            )
        while tokens < need:  # few different lengths, as each is compiled
            tokens = _rounded(tokens * 17 / 16)
        return tokens


def open_packing(config: Config, tokens: Tokens, eos_id: int, mesh: Mesh) -> Packing:
    """For a run on these tokens, whose rows are as long as a sample of the captions needs."""
    lengths = sampled_lengths(tokens, eos_id)
    text, stream = config.text, config.stream
    texts = stream.global_batch * stream.captions_per_image // mesh.size
    row_tokens = text.row_tokens or foreseen_row_tokens(lengths, text.pack, texts)
    own, alone = len(mesh.local_devices), len(mesh.local_devices) == mesh.size
    return Packing(text.pack, row_tokens, eos_id, float(lengths.mean()), own, alone)


def sampled_lengths(tokens: Tokens, eos_id: int) -> np.ndarray:
    """True lengths int64 [m] of captions from blocks here and there: as many of every row, as batches take them."""
    blocks, reader = tokens.dataset.blocks, tokens.reader()
    sample = np.linspace(0, blocks - 1, min(blocks, _SAMPLE)).astype(int)
    captions = read_captions(tokens, (reader.read(int(b)) for b in np.unique(sample)))
    rows = np.flatnonzero(np.diff(captions.starts))
    return true_lengths(captions.choose(rows, rows, np.zeros_like(rows), _CAPTIONS, 0), eos_id)


def foreseen_row_tokens(lengths: np.ndarray, pack: int, texts: int) -> int:
    """Tokens of a row that practically every batch has room in.

    Args:
      lengths: int [m], of a fair sample of the captions.
      pack: captions in a row.
      texts: of a device in one step.
    """
    # A batch whose lengths are spread just as the sample's, with its longest, and the chance that it has longer
    # ones on average.
    spread = np.quantile(lengths, (np.arange(texts) + 0.5) / texts, method="inverted_cdf").astype(np.int64)
    spread[-1] = lengths.max()
    need = spread[deal(spread, pack)].sum(axis=1).max()
    return _rounded(need + _DEVIATIONS * pack * lengths.std() / texts**0.5)


def _rounded(tokens: float) -> int:
    return -(-int(np.ceil(tokens)) // _STEP) * _STEP
