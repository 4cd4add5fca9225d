"""Permutations and random numbers that are the same on every machine and with every version of NumPy."""

from __future__ import annotations

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """Return a permutation of `range(n)`, int64 `[n]`, that depends on `n` and the non-negative integers `key` only.

    NumPy guarantees the raw stream of Philox and the words of SeedSequence across versions, but not
    `Generator.permutation`. The order is therefore a stable sort of raw words.
    """
    return np.argsort(random_words(n, *key), kind="stable")


def random_words(n: int, *key: int) -> np.ndarray:
    """Return random uint64 `[n]` that depend on the non-negative integers `key` only.

    A longer result begins with a shorter one of the same key.
    """
    # The length is part of the seed because SeedSequence treats [3] and [3, 0] alike.
    return np.random.Philox(np.random.SeedSequence([len(key), *key])).random_raw(n)
