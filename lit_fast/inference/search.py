"""Find the rows of a dataset that are nearest to queries.

All stored features are compared, in float32. Threads read and score one block each. Memory holds `_IN_FLIGHT` blocks
and the best rows, whatever the size of the dataset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lit_fast.data.dataset import BLOCK, Dataset, decode_block, decode_captions
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.errors import UserError
from lit_fast.storage.machine import cpu_count

_IN_FLIGHT = 16  # blocks whose results are awaited


@dataclass(frozen=True)
class Hit:
    """A row that was found."""

    row: int
    cosine: float
    key: str
    captions: tuple[str, ...]
    source: str = ""  # shortest distinct end of its source's path, "" in a dataset of one source


def search(
    features: Features, queries: np.ndarray, top: int, embed: Callable[[np.ndarray], np.ndarray]
) -> list[list[tuple[int, float]]]:
    """Find the rows with the greatest cosines; invalid rows are left out.

    Cosines are float32 sums, accurate to about 1e-6. Of equal cosines the lower row comes first. Rows whose cosines
    differ by less than the rounding, such as those of duplicate images, may come in either order, which is the same
    every time.

    Args:
      features: complete; of several views the first is compared.
      queries: normalized float32 [queries, width].
      top: rows per query; fewer are returned if the dataset has fewer valid rows.
      embed: from stored features bfloat16 [n, width] to normalized embeddings float32 [n, width], see
        `lit_fast.inference.model.Model.embed_features`.

    Returns:
      Per query the rows and their cosines, by decreasing cosine.

    Raises:
      UserError: a shard is missing or damaged, or a feature is not finite.
    """
    features.array()  # check its shape and layout
    reader, num_rows = features.block_reader(), features.dataset.rows
    valid = np.ones(num_rows, bool)
    valid[list(features.invalid_rows())] = False

    top = min(top, int(valid.sum()))
    if not top:
        return [[] for _ in queries]
    # The best rows of every query so far and their cosines, by decreasing cosine; -inf where there are fewer.
    best_rows = np.zeros((len(queries), top), np.int64)
    best_cosines = np.full((len(queries), top), -np.inf, np.float32)

    def score_block(block: int) -> tuple[np.ndarray, np.ndarray]:
        stored = np.empty((BLOCK, features.views * features.width), BFLOAT16)
        reader.read(block, stored)
        first = block * BLOCK
        rows = first + np.flatnonzero(valid[first : first + BLOCK])
        with np.errstate(invalid="ignore", over="ignore"):
            cosines = embed(stored[rows - first, : features.width]) @ queries.T
        if not np.isfinite(cosines).all():
            row = rows[np.argmin(np.isfinite(cosines).all(axis=1))]
            raise UserError(
                f"{features.path}: the features of row {row:,} are not finite; find and fix damaged shards with: "
                f"lit-fast verify {features.dataset.path} --tower {features.tower} --repair"
            )
        return rows, cosines

    def keep_best(rows: np.ndarray, cosines: np.ndarray) -> None:
        """Merge the rows [n] of the next block with their cosines [n, queries]."""
        changed = np.flatnonzero(cosines.max(axis=0, initial=-np.inf) > best_cosines[:, -1])
        rows = np.concatenate([best_rows[changed], np.tile(rows, (len(changed), 1))], axis=1)
        cosines = np.concatenate([best_cosines[changed], cosines.T[changed]], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
        best_rows[changed] = np.take_along_axis(rows, order, axis=1)
        best_cosines[changed] = np.take_along_axis(cosines, order, axis=1)

    pending: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
    pool = ThreadPoolExecutor(cpu_count(), thread_name_prefix="search")
    try:
        for block in range(features.dataset.blocks):
            pending.append(pool.submit(score_block, block))
            if len(pending) == _IN_FLIGHT:
                keep_best(*pending.popleft().result())
        while pending:
            keep_best(*pending.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)
    return [
        list(zip(rows, cosines, strict=True))
        for rows, cosines in zip(best_rows.tolist(), best_cosines.tolist(), strict=True)
    ]


def read_hits(dataset: Dataset, found: list[tuple[int, float]]) -> list[Hit]:
    """Read the keys and captions of rows that `search` found."""
    index, captions = dataset.index_reader(), dataset.captions_reader()
    blocks = {row // BLOCK for row, _ in found}
    rows = {block: decode_block(index.read(block)) for block in blocks}
    texts = {block: decode_captions(captions.read(block)) for block in blocks}
    hits = []
    for row, cosine in found:
        number, i = divmod(row, BLOCK)
        source = dataset.source_names[rows[number].sources[i]] if len(dataset.sources) > 1 else ""
        hits.append(Hit(row, cosine, rows[number].keys[i], tuple(texts[number][i]), source))
    return hits
