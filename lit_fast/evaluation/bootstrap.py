"""Bootstrap: 95 % intervals of figures over the choice of images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
_CHUNK = 25  # resamples in memory at a time, with a seed of their own

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
    chunks = []
    for first in range(0, resamples, _CHUNK):
        generator = np.random.default_rng((0, first))
        count = min(_CHUNK, resamples - first)
        weights = generator.multinomial(len(table), sizes / len(table), size=count)
        chunks.append(statistics(rows, weights.astype(np.float64)))
    return {
        name: np.nanquantile(np.concatenate([figures[name] for figures in chunks]), (0.025, 0.975)).tolist()
        for name in chunks[0]
    }


def _groups(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct rows, sorted, and their counts; faster than `np.unique` of rows."""
    rows = table[np.lexsort(table.T[::-1])]
    first = np.flatnonzero(np.r_[True, (rows[1:] != rows[:-1]).any(axis=1)])
    return rows[first], np.diff(first, append=len(rows))
