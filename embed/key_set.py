"""A set of keys in 8 bytes per key.

A key is identified by 64 bits of its BLAKE2b. Of 100 million different keys two have the same bits with a
probability of 0.03 %; then one row is skipped as a duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class KeySet:
    """A set of keys as sorted arrays of hashes, each at least twice as long as the next.

    Adding n keys sorts each hash about log2(n / batch) times. A look-up is a binary search in as many arrays.
    """

    def __init__(self) -> None:
        self._sorted: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._sorted))

    def add(self, keys: Sequence[str]) -> np.ndarray:
        """Add keys.

        Returns:
          bool `[len(keys)]`: whether the key was added for the first time.
        """
        hashes = np.fromiter((_hash(key) for key in keys), np.uint64, len(keys))
        unique, first = np.unique(hashes, return_index=True)
        is_new = np.ones(len(unique), bool)
        for known in self._sorted:
            position = np.searchsorted(known, unique)
            is_new &= known[np.minimum(position, len(known) - 1)] != unique
        result = np.zeros(len(keys), bool)
        result[first[is_new]] = True
        self._insert(unique[is_new])
        return result

    def _insert(self, hashes: np.ndarray) -> None:
        if not len(hashes):
            return
        self._sorted.append(hashes)
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            merged = np.concatenate([self._sorted.pop(), self._sorted.pop()])
            merged.sort(kind="stable")  # a radix or merge sort, since two parts are sorted already
            self._sorted.append(merged)


def _hash(key: str) -> int:
    data = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
