"""Permutations and random numbers that are the same on every machine and with every version of numpy."""

from __future__ import annotations

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of `range(n)`, int64 `[n]`, that depends on `n` and the non-negative ints `key` only.

    numpy does not promise that `Generator.permutation` stays the same across versions; it does promise the
    raw stream of Philox and the words of SeedSequence, so the order is a stable sort of raw words.
    """
    return np.argsort(random_words(n, *key), kind="stable")


def random_words(n: int, *key: int) -> np.ndarray:
    """Random uint64 `[n]` that depend on the non-negative ints `key` only; the first ones whatever `n` is."""
    # SeedSequence takes [3] and [3, 0] for the same, hence the length.
    return np.random.Philox(np.random.SeedSequence([len(key), *key])).random_raw(n)
