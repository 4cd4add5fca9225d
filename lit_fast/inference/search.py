"""Find the rows of a dataset that are nearest to queries: all stored features are compared, in float32.

Blocks are read with TensorStore while others are scored. Memory holds `_IN_FLIGHT` blocks and the best rows, whatever
the size of the dataset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import BLOCK, Dataset, decode_block, decode_captions
from lit_fast.data.features import Features
from lit_fast.data.shards import read_error
from lit_fast.errors import UserError
from lit_fast.utils.system import cpu_count

_IN_FLIGHT = 16  # blocks that are being read or scored


@dataclass(frozen=True)
class Hit:
    """A row that was found."""

    row: int
    cosine: float
    key: str
    captions: tuple[str, ...]


class _Nearest(NamedTuple):
    """Per query the best rows, by decreasing cosine."""

    rows: np.ndarray  # int64 [queries, n]
    cosines: np.ndarray  # float32 [queries, n]


def search(
    features: Features, queries: np.ndarray, top: int, embed: Callable[[np.ndarray], np.ndarray]
) -> list[list[tuple[int, float]]]:
    """Find the rows with the greatest cosines; invalid rows are left out.

    Cosines are float32 sums, accurate to about 1e-6. Of equal cosines the lower row comes first. Rows whose cosines
    differ by less than the rounding, such as those of duplicate images, may come in either order, which is the same
    every time.

    Args:
      features: complete; of several views the first is compared.
      queries: normalised float32 [queries, width].
      top: rows per query; fewer are returned if the dataset has fewer valid rows.
      embed: from stored features bfloat16 [n, width] to normalised embeddings float32 [n, width], see
        `lit_fast.inference.model.Model.embed_features`.

    Returns:
      Per query the rows and their cosines, by decreasing cosine.

    Raises:
      UserError: a shard is missing or damaged, or a feature is not finite.
    """
    array, num_rows = features.array(), features.dataset.rows
    valid = np.ones(num_rows, bool)
    valid[list(features.invalid_rows())] = False

    def search_block(first: int, read: ts.Future[np.ndarray]) -> _Nearest:
        block = read.result()
        rows = first + np.flatnonzero(valid[first : first + len(block)])
        if len(rows) < len(block):
            block = block[rows - first]
        with np.errstate(invalid="ignore", over="ignore"):
            cosines = queries @ embed(block).T
        if not np.isfinite(cosines).all():
            row = rows[np.argmin(np.isfinite(cosines).all(axis=0))]
            raise UserError(
                f"{features.path}: the features of row {row:,} are not finite; find and fix damaged shards with: "
                f"lit-fast verify {features.dataset.path} --tower {features.tower} --repair"
            )
        return _largest(np.broadcast_to(rows, cosines.shape), cosines, top)

    nearest = _Nearest(np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32))
    pending: deque[Future[_Nearest]] = deque()
    pool = ThreadPoolExecutor(cpu_count(), thread_name_prefix="search")
    try:
        for first in range(0, num_rows, BLOCK):
            read = array[first : min(first + BLOCK, num_rows), : features.width].read()
            pending.append(pool.submit(search_block, first, read))
            if len(pending) == _IN_FLIGHT:
                nearest = _merge(nearest, pending.popleft().result(), top)
        for block_nearest in pending:
            nearest = _merge(nearest, block_nearest.result(), top)
    except ValueError as error:  # TensorStore found a wrong checksum
        raise read_error(features.path, error) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return [list(zip(r.tolist(), c.tolist(), strict=True)) for r, c in zip(*nearest, strict=True)]


def _merge(earlier: _Nearest, later: _Nearest, top: int) -> _Nearest:
    """Merge the results of earlier and of later rows."""
    rows, cosines = (np.concatenate(pair, axis=1) for pair in zip(earlier, later, strict=True))
    return _largest(rows, cosines, top)


def _largest(rows: np.ndarray, cosines: np.ndarray, top: int) -> _Nearest:
    """Select the greatest cosines of each query; of equal ones the first."""
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    return _Nearest(np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1))


def read_hits(dataset: Dataset, found: list[tuple[int, float]]) -> list[Hit]:
    """Read the keys and captions of rows with their cosines, as `search` returns them."""
    index, captions = dataset.index_reader(), dataset.captions_reader()
    blocks = {row // BLOCK for row, _ in found}
    keys = {block: decode_block(index.read(block)).keys for block in blocks}
    texts = {block: decode_captions(captions.read(block)) for block in blocks}
    return [
        Hit(row, cosine, keys[row // BLOCK][row % BLOCK], tuple(texts[row // BLOCK][row % BLOCK]))
        for row, cosine in found
    ]
