"""Bootstrap: 95 % intervals of figures over the choice of images."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lit_fast.storage.machine import cpu_count

RESAMPLES = 1000

_MAX_COUNTS = 1 << 22  # in memory at a time: 32 MiB as float64
_RESAMPLES_PER_SEED = (
    25  # drawn together by one thread, so the result does not depend on the number of threads
)

Statistics = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
"""(rows int64 [g, k], weights float64 [r, g]) -> figures by name, float64 [r].

`rows` are distinct and sorted; `weights` are the multiplicities of the rows in r samples.
"""


def point_estimates(statistics: Statistics, table: np.ndarray) -> dict[str, float]:
    """Return the figures of all images; arguments as for `bootstrap`."""
    rows, sizes = _groups(table)
    figures = statistics(rows, sizes[None].astype(np.float64))
    return {name: float(values[0]) for name, values in figures.items()}


def bootstrap(
    statistics: Statistics, table: np.ndarray, resamples: int = RESAMPLES
) -> dict[str, list[float]]:
    """Return 95 % percentile intervals of figures by name, from a fixed seed.

    A resample draws as many images as there are, with replacement. An image comes with all its captions, and the
    candidates of a retrieval stay the same. Variation between trainings is not included. Images with equal rows form
    a group, and the group sizes of a resample are one draw from a multinomial distribution.

    Args:
      statistics: see `Statistics`. NaN, the figure of a resample without any image for it, is ignored.
      table: int [images, k], the contribution of each image to the figures.
      resamples: their number.
    """
    rows, sizes = _groups(table)
    shares = sizes / len(table)
    chunk = max(1, _MAX_COUNTS // len(rows))
    draws = min(_RESAMPLES_PER_SEED, chunk)
    chunk = chunk // draws * draws

    def counts(first: int) -> np.ndarray:
        generator = np.random.default_rng((0, first))
        return generator.multinomial(len(table), shares, size=min(draws, resamples - first))

    chunks = []
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="bootstrap") as pool:
        for lo in range(0, resamples, chunk):
            weights = pool.map(counts, range(lo, min(lo + chunk, resamples), draws))
            chunks.append(statistics(rows, np.concatenate(list(weights), dtype=np.float64)))
    return {
        name: np.nanquantile(np.concatenate([figures[name] for figures in chunks]), (0.025, 0.975)).tolist()
        for name in chunks[0]
    }


def _groups(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct rows, sorted, and their counts; faster than `np.unique` of rows."""
    rows = table[np.lexsort(table.T[::-1])]
    first = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]).any(axis=1)])
    return rows[first], np.diff(first, append=len(rows))
