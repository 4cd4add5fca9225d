"""Where the right candidates of a query stand among all, without ever holding the matrix of all scores.

Scores are float32 dot products; candidates are ordered by falling score, equal ones by rising number. Equal
means equal as computed: two identical candidates can come out of a matrix product a bit apart.
"""

from __future__ import annotations

import numpy as np

# Scores held at a time in whole rows: 16 MiB as float32; with fewer the product is slower.
_TILE = 1 << 22

# Scores compared at a time: 512 KiB, so that the second comparison finds them in a core's own cache.
_COMPARED = 1 << 17


def ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_of: np.ndarray,
    candidate_of: np.ndarray,
    *,
    tile: int = _TILE,
) -> np.ndarray:
    """The position of every query's best right candidate, int64 [n], 0 = first.

    The score of a right candidate is taken out of the tile that it is compared in, because a dot product
    computed by itself can differ from it in the last bit.

    Args:
      queries: float32 [n, D], finite, n > 0.
      candidates: float32 [m, D], finite, m > 0.
      query_of: int [p], rising; with `candidate_of` the pairs of a query and a right candidate. Every query
        has at least one.
      candidate_of: int [p].
      tile: scores held at a time, in whole rows; decides the memory.
    """
    n, m = len(queries), len(candidates)
    first = first_of(query_of, n)
    out = np.empty(n, np.int64)
    step, rows = min(n, max(1, tile // m)), max(1, _COMPARED // m)
    scores = np.empty((step, m), np.float32)  # one buffer: fresh memory costs more than the comparing
    numbers = np.arange(m)
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        part = np.matmul(queries[lo:hi], candidates.T, out=scores[: hi - lo])
        pairs = slice(first[lo], first[hi])
        own = part[query_of[pairs] - lo, candidate_of[pairs]]
        best, number = best_right(own, candidate_of[pairs], first[lo : hi + 1] - first[lo])
        # Right candidates never stand before the best of them; hidden, they are no ties to be settled either.
        part[query_of[pairs] - lo, candidate_of[pairs]] = -np.inf
        for a in range(0, hi - lo, rows):
            some = slice(a, min(a + rows, hi - lo))
            marks = before(part[some], best[some, None], numbers, number[some, None])
            out[lo + some.start : lo + some.stop] = count_rows(marks)
    return out


def first_of(query_of: np.ndarray, n: int) -> np.ndarray:
    """Where the pairs of each of `n` queries begin, and the end, int64 [n + 1].

    Raises:
      ValueError: `query_of` does not rise, or a query has no pair.
    """
    counts = np.bincount(query_of, minlength=n)
    if len(counts) != n or not counts.all() or (np.diff(query_of) < 0).any():
        raise ValueError(f"{n} queries, but pairs that do not name each of them in order")
    return np.concatenate([[0], np.cumsum(counts)])


def best_right(own: np.ndarray, numbers: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest score per query, float32 [n], and the lowest number that has it, int64 [n].

    Args:
      own: float32 [p], the scores of the pairs.
      numbers: int [p], their candidates.
      first: int [n + 1], where the pairs of a query begin.
    """
    best = np.maximum.reduceat(own, first[:-1])
    highest = own == np.repeat(best, np.diff(first))
    number = np.minimum.reduceat(np.where(highest, numbers, np.iinfo(np.int64).max), first[:-1])
    return best, number


def before(scores: np.ndarray, best: np.ndarray, numbers: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Which scores come before `best`, the score of the candidate `number`: bool, in the shape of `scores`."""
    out = scores > best
    equal = scores == best
    if equal.any():
        out |= equal & (numbers < number)
    return out


def count_rows(marks: np.ndarray) -> np.ndarray:
    """How many are true in each row of bool [a, b], int64 [a]."""
    return np.bitwise_count(np.packbits(marks, axis=1)).sum(axis=1, dtype=np.int64)


def count_columns(marks: np.ndarray) -> np.ndarray:
    """How many are true in each column of bool [a, b], int64 [b]."""
    out = np.zeros(marks.shape[1], np.int64)
    for lo in range(0, len(marks), 255):  # the most that eight bits count to
        out += marks[lo : lo + 255].view(np.uint8).sum(axis=0, dtype=np.uint8)
    return out
