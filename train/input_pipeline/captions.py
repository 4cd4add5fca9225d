"""The captions of some rows, and which of a row's captions a visit uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lit_fast.data.tokens import Tokens


@dataclass(frozen=True)
class Captions:
    """Padded ids of rows in order: row r has `ids[starts[r] : starts[r + 1]]`."""

    starts: np.ndarray  # int64 [rows + 1]
    ids: np.ndarray  # uint16 or uint32 [captions, length]

    def choose(self, local: np.ndarray, rows: np.ndarray, visit: np.ndarray, k: int, seed: int) -> np.ndarray:
        """`k` captions for each of n rows: ids [n * k, length].

        Visits go round a row's captions from a start that depends on (seed, row), so every caption is used
        equally often.

        Args:
          local: int64 [n], position in this table.
          rows: int64 [n], row of the dataset.
          visit: int64 [n], how often the row was visited before; the epoch.
          k: captions per row; rows with fewer repeat theirs.
          seed: of the run.
        """
        first = self.starts[local]
        count = self.starts[local + 1] - first
        turn = (row_hash(rows, seed) + visit * k)[:, None] + np.arange(k)
        index = first[:, None] + turn % count[:, None]
        return np.take(self.ids, index.ravel(), axis=0, mode="clip")


def row_hash(rows: np.ndarray, seed: int) -> np.ndarray:
    """Int64 below 2^32 per row: the upper half of splitmix64 of (seed, row)."""
    x = rows.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(32)).astype(np.int64)


def read_captions(tokens: Tokens, records: Iterable[bytes]) -> Captions:
    """The captions of consecutive records of a token store."""
    parts = [tokens.decode(record) for record in records]
    counts = np.concatenate([c for c, _ in parts]).astype(np.int64)
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return Captions(starts, np.concatenate([ids for _, ids in parts]))


# Which of a row's views a visit uses.


_PURPOSE = 0x766965777300  # so that the choice of the view has nothing to do with that of the caption


def choose_vectors(
    local: np.ndarray, rows: np.ndarray, visit: np.ndarray, views: int, seed: int
) -> np.ndarray:
    """Positions int64 [n] in a `[rows * views, width]` table, one view for each of n rows.

    Drawn anew at every visit from (seed, visit, row) alone, each view with the same probability. Not in
    turn: the captions go round, and would always meet the same view.

    Args:
      local: int64 [n], position of the row in the table.
      rows: int64 [n], row of the dataset, below 2^31.
      visit: int64 [n], the epoch.
      views: views per row.
      seed: of the run.
    """
    if views == 1:
        return local
    return local * views + (row_hash(rows + (visit << 31), seed + _PURPOSE) * views >> 32)
