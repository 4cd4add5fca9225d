"""Exact search in a dataset's stored features: the rows nearest to each query.

Blocks are read straight from TensorStore, several at a time, while others are scored: a block becomes float32, is
centred and normalised, and one matrix product gives its cosines with all queries. Only what may still be among the
best is looked at again, in float64, so that the result does not depend on where in a block a row stands: equal
features get equal scores, and of equal scores the lower row comes first. Memory holds some blocks and the best
rows, whatever the size of the dataset.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from lit_fast.data.dataset import BLOCK, Dataset, decode_block, decode_captions
from lit_fast.data.features import Features, read_error
from lit_fast.errors import UserError
from lit_fast.utils.normalize import EPSILON
from lit_fast.utils.system import cpu_count

_IN_FLIGHT = 16  # blocks that are being read or scored


@dataclass(frozen=True)
class Hit:
    """A row that was found."""

    row: int
    cosine: float
    key: str
    captions: tuple[str, ...]


def search(
    features: Features, queries: np.ndarray, mean: np.ndarray, top: int, head: np.ndarray | None = None
) -> list[list[tuple[int, float]]]:
    """Per query the rows with the greatest cosines, greatest first, with these; invalid rows are never among them.

    The cosine is that of the query with the row's embedding: view 0 of its features minus `mean`, normalised, and
    with `head` multiplied by it and normalised again. Cosines are rounded to float32, and of equal ones the lower
    row comes first.

    Args:
      features: complete.
      queries: normalised float32 [q, width].
      mean: float32 [width].
      top: rows per query; fewer where the dataset has fewer valid rows.
      head: float32 [width, width], the image head.

    Raises:
      UserError: a shard is missing or damaged, or a feature is not finite.
    """
    best = _Best(features, queries, mean, top, head)
    array, rows = features.array(), features.dataset.rows
    pool = ThreadPoolExecutor(cpu_count(), thread_name_prefix="search")
    scoring: deque[Future[None]] = deque()
    try:
        for first in range(0, rows, BLOCK):
            reading = array[first : min(first + BLOCK, rows), : features.width].read()
            scoring.append(pool.submit(best.look, first, reading))
            if len(scoring) == _IN_FLIGHT:
                scoring.popleft().result()
        for scored in scoring:
            scored.result()
    except ValueError as error:  # TensorStore compares the checksums
        raise read_error(features.path, error) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return [
        list(zip(r.tolist(), c.tolist(), strict=True)) for r, c in zip(best.rows, best.cosines, strict=True)
    ]


class _Best:
    """The best rows so far of every query; `look` may be called from any thread, in any order of the blocks."""

    def __init__(
        self, features: Features, queries: np.ndarray, mean: np.ndarray, top: int, head: np.ndarray | None
    ) -> None:
        self._features, self._top, self._head = features, top, head
        self._mean = np.asarray(mean, np.float32)
        self._queries = np.ascontiguousarray(queries, np.float32)
        self._invalid = np.array(sorted(features.invalid_rows()), np.int64)
        # How far a float32 cosine of unit vectors may be off: width + 4 roundings of 2^-24 in the product and in
        # the lengths, for the row and for the one it is compared with, and as much again for a head.
        self._slack = (4 if head is None else 8) * (features.width + 4) * 2.0**-24
        self._lock = Lock()
        self.rows = [np.zeros(0, np.int64) for _ in self._queries]
        self.cosines = [np.zeros(0, np.float32) for _ in self._queries]
        # The worst of the best, once there are `top` of them.
        self._floor = np.full(len(self._queries), -np.inf)

    def look(self, first: int, reading: Any) -> None:
        """Take in a block: its first row, and the future of its bfloat16 features [n, width]."""
        block = reading.result()
        rows = np.arange(first, first + len(block))
        cosines = self._cosines(_float32(block))
        valid = np.ones(len(rows), bool)
        lo, hi = np.searchsorted(self._invalid, (first, first + len(rows)))
        valid[self._invalid[lo:hi] - first] = False
        if not np.isfinite(cosines[valid]).all():
            row = rows[valid][~np.isfinite(cosines[valid]).all(axis=1)][0]
            raise UserError(
                f"{self._features.path}: the features of row {row:,} are not finite; lit-fast verify --repair "
                "finds and mends what is damaged"
            )
        cosines[~valid] = -np.inf
        floor = self._floor - self._slack
        if len(cosines) > self._top:
            inside = np.partition(cosines, -self._top, axis=0)[-self._top]
            floor = np.maximum(floor, inside - self._slack)
        near = (cosines >= floor) & valid[:, None]
        for query in np.flatnonzero(near.any(axis=0)).tolist():
            places = np.flatnonzero(near[:, query])
            exact = self._embeddings(block[places].astype(np.float64))
            # A sum per row, since a matrix product's last bits depend on the row's place in it.
            found = (exact * self._queries[query].astype(np.float64)).sum(axis=1).astype(np.float32)
            self._keep(query, rows[places], found)

    def _cosines(self, x: np.ndarray) -> np.ndarray:
        """Of features float32 [n, width], which are overwritten, with all queries: [n, q], up to the slack."""
        if self._head is not None:
            return self._embeddings(x) @ self._queries.T
        x -= self._mean
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found and named afterwards
            return (x @ self._queries.T) / _lengths(x)  # cheaper than to normalise the rows

    def _embeddings(self, x: np.ndarray) -> np.ndarray:
        """Normalised embeddings of features [n, width], in their dtype and in their place."""
        x -= self._mean
        _normalize(x)
        if self._head is None:
            return x
        x = x @ self._head if x.dtype == np.float32 else _row_by_row(x, self._head)
        _normalize(x)
        return x

    def _keep(self, query: int, rows: np.ndarray, cosines: np.ndarray) -> None:
        with self._lock:
            rows = np.concatenate([self.rows[query], rows])
            cosines = np.concatenate([self.cosines[query], cosines])
            order = np.lexsort((rows, -cosines))[: self._top]
            self.rows[query], self.cosines[query] = rows[order], cosines[order]
            if len(order) == self._top:
                self._floor[query] = cosines[order[-1]]


def _float32(block: np.ndarray) -> np.ndarray:
    """bfloat16 as float32: its bits are the upper half of a float32's."""
    words: np.ndarray = np.left_shift(block.view(np.uint16), np.uint32(16), dtype=np.uint32)
    return words.view(np.float32)


def _row_by_row(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`x @ matrix` in float64, the same for a row wherever it stands."""
    wide = matrix.astype(np.float64)
    return np.stack([row @ wide for row in x])


def _normalize(x: np.ndarray) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        x /= _lengths(x)


def _lengths(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", x, x))[:, None] + EPSILON


def describe(dataset: Dataset, found: list[tuple[int, float]]) -> list[Hit]:
    """Rows and cosines, as `search` gives them, with the rows' keys and captions."""
    index, captions = dataset.index_reader(), dataset.captions_reader()
    numbers = {row // BLOCK for row, _ in found}
    keys = {b: decode_block(index.read(b)).keys for b in numbers}
    texts = {b: decode_captions(captions.read(b)) for b in numbers}
    return [
        Hit(row, cosine, keys[row // BLOCK][row % BLOCK], tuple(texts[row // BLOCK][row % BLOCK]))
        for row, cosine in found
    ]
