"""Which keys were seen before, in 8 bytes per key.

A key is known by 64 bits of its BLAKE2b. Two of 100 million different keys share them with a probability of
0.03 %; then one row is left out as a duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class KeySet:
    """A set of keys as sorted arrays of their hashes, each at least twice as long as the next.

    Adding n keys sorts each hash about log2(n / batch) times, and a look-up is a binary search in as many
    arrays.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._sorted))

    def add(self, keys: Sequence[str]) -> np.ndarray:
        """Add keys; bool `[len(keys)]`: True where it is the first of its kind."""
        hashes = np.fromiter((_hash(key) for key in keys), np.uint64, len(keys))
        unique, first = np.unique(hashes, return_index=True)
        new = np.ones(len(unique), bool)
        for known in self._sorted:
            place = np.searchsorted(known, unique)
            new &= known[np.minimum(place, len(known) - 1)] != unique
        fresh = np.zeros(len(keys), bool)
        fresh[first[new]] = True
        self._insert(unique[new])
        return fresh

    def _insert(self, hashes: np.ndarray) -> None:
        if not len(hashes):
            return
        self._sorted.append(hashes)
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            merged = np.concatenate([self._sorted.pop(), self._sorted.pop()])
            merged.sort(kind="stable")  # a radix or merge sort: two runs that are sorted already
            self._sorted.append(merged)


def _hash(key: str) -> int:
    data = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
