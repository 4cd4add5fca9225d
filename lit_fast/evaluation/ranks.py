"""Ranks of the relevant candidates of queries, without the matrix of all scores.

Scores are float32 dot products. Candidates are ordered by decreasing score, equal ones by increasing index. Two
identical candidates may differ in the last bit of a matrix product and then count as different.
"""

from __future__ import annotations

import numpy as np

# Scores per tile, in whole rows: 16 MiB as float32. Smaller products are slower.
_TILE = 1 << 22

# Scores compared at a time: 512 KiB, which fit in a core's own cache for the second comparison.
_COMPARED = 1 << 17


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_of: np.ndarray,
    candidate_of: np.ndarray,
    *,
    tile: int = _TILE,
) -> np.ndarray:
    """Return the rank of each query's best relevant candidate, int64 [n]; 0 = first.

    The score of a relevant candidate is taken from the tile that it is compared in, because a separate dot product can
    differ in the last bit.

    Args:
      queries: float32 [n, D], finite, n > 0.
      candidates: float32 [m, D], finite, m > 0.
      query_of: int [p], non-decreasing; with `candidate_of` the pairs of a query and a relevant candidate. Every query
        has at least one.
      candidate_of: int [p].
      tile: scores in memory at a time, in whole rows.
    """
    n, m = len(queries), len(candidates)
    offsets = pair_offsets(query_of, n)
    out = np.empty(n, np.int64)
    step, rows = min(n, max(1, tile // m)), max(1, _COMPARED // m)
    buffer = np.empty((step, m), np.float32)  # reused: fresh memory costs more than the comparisons
    indices = np.arange(m)
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        scores = np.matmul(queries[lo:hi], candidates.T, out=buffer[: hi - lo])
        pairs = slice(offsets[lo], offsets[hi])
        relevant = scores[query_of[pairs] - lo, candidate_of[pairs]]
        best, index = best_relevant(relevant, candidate_of[pairs], offsets[lo : hi + 1] - offsets[lo])
        # Relevant candidates never precede the best of them; masked, they need no tie-breaking either.
        scores[query_of[pairs] - lo, candidate_of[pairs]] = -np.inf
        for a in range(0, hi - lo, rows):
            part = slice(a, min(a + rows, hi - lo))
            mask = precedes(scores[part], best[part, None], indices, index[part, None])
            out[lo + part.start : lo + part.stop] = count_rows(mask)
    return out


def pair_offsets(query_of: np.ndarray, n: int) -> np.ndarray:
    """Return the first pair of each of `n` queries, and the end, int64 [n + 1].

    Raises:
      ValueError: `query_of` decreases somewhere, or a query has no pair.
    """
    counts = np.bincount(query_of, minlength=n)
    if len(counts) != n or not counts.all() or (np.diff(query_of) < 0).any():
        raise ValueError(f"the pairs do not name each of {n} queries in order")
    return np.concatenate([[0], np.cumsum(counts)])


def best_relevant(
    scores: np.ndarray, candidates: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest score per query, float32 [n], and the lowest candidate that has it, int64 [n].

    Args:
      scores: float32 [p], of the pairs.
      candidates: int [p], of the pairs.
      offsets: int [n + 1], as returned by `pair_offsets`.
    """
    best = np.maximum.reduceat(scores, offsets[:-1])
    highest = scores == np.repeat(best, np.diff(offsets))
    index = np.minimum.reduceat(np.where(highest, candidates, np.iinfo(np.int64).max), offsets[:-1])
    return best, index


def precedes(scores: np.ndarray, best: np.ndarray, indices: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Whether candidates precede one with score `best` and index `index`: bool, in the shape of `scores`."""
    out = scores > best
    equal = scores == best
    if equal.any():
        out |= equal & (indices < index)
    return out


def count_rows(mask: np.ndarray) -> np.ndarray:
    """Count the true elements in each row of bool [a, b]: int64 [a]."""
    return np.bitwise_count(np.packbits(mask, axis=1)).sum(axis=1, dtype=np.int64)


def count_columns(mask: np.ndarray) -> np.ndarray:
    """Count the true elements in each column of bool [a, b]: int64 [b]."""
    out = np.zeros(mask.shape[1], np.int64)
    for lo in range(0, len(mask), 255):  # the largest count in eight bits
        out += mask[lo : lo + 255].view(np.uint8).sum(axis=0, dtype=np.uint8)
    return out
