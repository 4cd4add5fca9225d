"""Captions and views that an epoch uses of each row.

Both are pure functions of (seed, row, epoch), so that the position in the data is one integer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lit_fast.data.tokens import Tokens

_VIEW_SEED = 0x766965777300  # makes the choice of the view independent of the choice of the caption


@dataclass(frozen=True)
class Captions:
    """Padded ids of consecutive rows: row r has `ids[starts[r] : starts[r + 1]]`."""

    starts: np.ndarray  # int64 [rows + 1]
    ids: np.ndarray  # uint16 or uint32 [captions, length]

    def choose(
        self, positions: np.ndarray, rows: np.ndarray, epoch: np.ndarray, k: int, seed: int
    ) -> np.ndarray:
        """Return `k` captions for each of n rows: ids [n * k, length].

        Epochs cycle through the captions of a row, starting at one that depends on (seed, row), so that all
        captions are used equally often.

        Args:
          positions: int64 [n], positions of the rows in this table.
          rows: int64 [n], rows of the dataset.
          epoch: int64 [n], how often each row was used before.
          k: captions per row; the captions of a row with fewer are repeated.
          seed: seed of the run.
        """
        first = self.starts[positions]
        count = self.starts[positions + 1] - first
        number = (row_hash(rows, seed) + epoch * k)[:, None] + np.arange(k)
        index = first[:, None] + number % count[:, None]
        return np.take(self.ids, index.ravel(), axis=0, mode="clip")


def read_captions(tokens: Tokens, records: Iterable[bytes]) -> Captions:
    """Decode the captions of consecutive records of a token store."""
    parts = [tokens.decode(record) for record in records]
    counts = np.concatenate([c for c, _ in parts]).astype(np.int64)
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return Captions(starts, np.concatenate([ids for _, ids in parts]))


def choose_views(
    positions: np.ndarray, rows: np.ndarray, epoch: np.ndarray, views: int, seed: int
) -> np.ndarray:
    """Return one view for each of n rows, as positions int64 [n] in a `[rows * views, width]` table.

    Views are drawn with equal probability from (seed, epoch, row). They do not cycle as captions do, because each
    caption would then occur with the same views only.

    Args:
      positions: int64 [n], positions of the rows in the table.
      rows: int64 [n], rows of the dataset, below 2^31.
      epoch: int64 [n].
      views: views per row.
      seed: seed of the run.
    """
    if views == 1:
        return positions
    return positions * views + (row_hash(rows + (epoch << 31), seed + _VIEW_SEED) * views >> 32)


def row_hash(rows: np.ndarray, seed: int) -> np.ndarray:
    """Return int64 [n] below 2^32: the upper half of splitmix64 of (seed, row)."""
    x = rows.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(32)).astype(np.int64)
