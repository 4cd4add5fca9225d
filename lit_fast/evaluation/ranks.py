"""Ranks of the relevant candidates of queries, without the matrix of all scores.

Scores are float32 dot products. Candidates are ordered by decreasing score, equal ones by increasing index. Two
identical candidates may differ in the last bit of a matrix product and then count as different.
"""

from __future__ import annotations

import numpy as np

_TILE = 1 << 22  # scores in memory at a time: 16 MiB; smaller products are slower


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_of: np.ndarray,
    candidate_of: np.ndarray,
    *,
    tile: int = _TILE,
) -> np.ndarray:
    """Return the rank of each query's best relevant candidate, int64 [n]; 0 = first.

    Args:
      queries: float32 [n, D], finite.
      candidates: float32 [m, D], finite.
      query_of: int [p], non-decreasing; with `candidate_of` the pairs of a query and a relevant candidate. Every query
        has at least one.
      candidate_of: int [p].
      tile: scores in memory at a time, in whole rows.
    """
    n, m = len(queries), len(candidates)
    offsets = np.searchsorted(query_of, np.arange(n + 1))
    out = np.empty(n, np.int64)
    step = min(n, max(1, tile // m))
    buffer = np.empty((step, m), np.float32)  # reused: allocating a tile takes longer than comparing it
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        scores = np.matmul(queries[lo:hi], candidates.T, out=buffer[: hi - lo])
        pairs = slice(offsets[lo], offsets[hi])
        query, candidate = query_of[pairs] - lo, candidate_of[pairs]
        starts = offsets[lo:hi] - offsets[lo]
        relevant = scores[query, candidate]  # separate dot products could differ in the last bit
        best = np.maximum.reduceat(relevant, starts)
        index = np.minimum.reduceat(np.where(relevant == best[query], candidate, m), starts)
        scores[query, candidate] = -np.inf  # relevant candidates never precede the best of them
        precedes = scores > best[:, None]
        equal = scores == best[:, None]
        if equal.any():
            precedes |= equal & (np.arange(m) < index[:, None])
        out[lo:hi] = np.bitwise_count(np.packbits(precedes, axis=1)).sum(axis=1, dtype=np.int64)
    return out


def chance_of_hit(relevant: np.ndarray, candidates: int, k: int) -> float:
    """Return the probability of a relevant one among the first k of randomly ordered candidates.

    It is 1 - C(m - c, k) / C(m, k) for c relevant ones of m, averaged over the queries.

    Args:
      relevant: int [n], the number of relevant candidates of each query.
      candidates: their total number.
      k: positions that count.
    """
    drawn = np.arange(min(k, candidates))
    # The probability that every draw misses; with fewer than k irrelevant ones a factor is 0.
    misses = ((candidates - relevant[:, None] - drawn) / (candidates - drawn)).prod(axis=1)
    return float(1 - misses.mean())
