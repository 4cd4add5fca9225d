"""Permutations that are the same on every machine and with every version of numpy."""

from __future__ import annotations

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of `range(n)`, int64 `[n]`, that depends on `n` and the non-negative ints `key` only.

    numpy does not promise that `Generator.permutation` stays the same across versions; it does promise the
    raw stream of Philox and the words of SeedSequence, so the order is a stable sort of raw words.
    """
    # SeedSequence takes [3] and [3, 0] for the same, hence the length.
    words = np.random.Philox(np.random.SeedSequence([len(key), *key])).random_raw(n)
    return np.argsort(words, kind="stable")
