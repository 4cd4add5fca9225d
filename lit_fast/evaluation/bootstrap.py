"""95 % intervals of figures over the choice of images, by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lit_fast.utils.system import cpu_count

RESAMPLES = 1000

# Counts held at a time: 32 MiB as float64.
_COUNTS = 1 << 22

# Resamples that a thread draws at a time, from a seed of their own: the same whatever the number of threads.
_DRAWS = 25

Measure = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""Of (rows [g, k], rising, weights float64 [r, g], how often each row counts) to figures, float64 [r]."""


def measured(measure: Measure, table: np.ndarray) -> dict[str, float]:
    """The figures of all images, each counted once; arguments as for `bootstrap`."""
    rows, sizes = _groups(table)
    figures = measure(rows, sizes[None].astype(np.float64))
    return {name: float(values[0]) for name, values in figures.items()}


def bootstrap(measure: Measure, table: np.ndarray, resamples: int = RESAMPLES) -> dict[str, list[float]]:
    """95 % percentile intervals of figures, from a fixed seed.

    A resample draws as many images as there are, with replacement; an image comes with all its captions,
    and the candidates of a retrieval stay the same. How far another training of the same recipe would land
    is not in the interval. Images that contribute the same are drawn together: how often each such group
    comes up is one draw from a multinomial distribution.

    Args:
      measure: see `Measure`. A figure that is not a number, where a resample leaves it without any image,
        does not count.
      table: int [images, k], what each image contributes to the figures.
      resamples: how many.
    """
    rows, sizes = _groups(table)
    shares = sizes / len(table)
    held = max(1, _COUNTS // len(rows))
    draws = min(_DRAWS, held)
    step = held // draws * draws

    def counts(first: int) -> np.ndarray:
        generator = np.random.default_rng((0, first))
        return generator.multinomial(len(table), shares, size=min(draws, resamples - first))

    drawn = []
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="bootstrap") as pool:
        for lo in range(0, resamples, step):
            parts = pool.map(counts, range(lo, min(lo + step, resamples), draws))
            drawn.append(measure(rows, np.concatenate(list(parts), dtype=np.float64)))
    return {
        name: np.nanquantile(np.concatenate([part[name] for part in drawn]), (0.025, 0.975)).tolist()
        for name in drawn[0]
    }


def _groups(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, rising, and how often each is there; `np.unique` of rows is much slower."""
    rows = table[np.lexsort(table.T[::-1])]
    first = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]).any(axis=1)])
    return rows[first], np.diff(first, append=len(rows))
