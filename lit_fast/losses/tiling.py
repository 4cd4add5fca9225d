"""Pairs a tile at a time: images by texts, so many that what a tile needs stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_TEXTS_PER_IMAGE = 2


def cut(tile: int, tree: Any) -> tuple[Any, jax.Array]:
    """A tree of arrays [n, ...] in equal tiles, [tiles, tile, ...] each, and what is real, bool [tiles, tile].

    No tile is larger than asked for; the last one is filled up with zeros, which are not real.
    """
    n = len(jax.tree.leaves(tree)[0])
    count = -(-n // tile)
    tile = -(-n // count)
    fill = count * tile - n

    def cut_array(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, fill)] + [(0, 0)] * (a.ndim - 1)).reshape(count, tile, *a.shape[1:])

    return jax.tree.map(cut_array, tree), cut_array(jnp.ones(n, bool))


def cut_texts(tile: int, tree: Any) -> tuple[Any, jax.Array]:
    """Likewise for the texts that a tile of images meets at a time, which are twice as many."""
    return cut(_TEXTS_PER_IMAGE * tile, tree)


def join(n: int, tree: Any) -> Any:
    """The arrays [n, ...] that were cut."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], tree)


def meet_texts(
    visit: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]],
    totals: Any,
    home: Any,
    texts: Any,
    real: jax.Array,
) -> tuple[Any, Any]:
    """Have all tiles of this device's texts meet one tile of images: (totals, home) afterwards.

    Args:
      visit: (totals, tile of home, tile of the texts, real bool [tile]) -> (totals, tile of home).
      totals: grow with every tile, any tree.
      home: tree of arrays [tiles, tile, ...] that change, each tile when it is met.
      texts: likewise, but they do not change.
      real: bool [tiles, tile], from `cut_texts`.
    """

    def meet(state: tuple[Any, Any], met: tuple[jax.Array, Any, jax.Array]) -> tuple[tuple[Any, Any], None]:
        totals, home = state
        i, texts, real = met
        totals, changed = visit(totals, jax.tree.map(lambda a: a[i], home), texts, real)
        return (totals, jax.tree.map(lambda a, b: a.at[i].set(b), home, changed)), None

    return lax.scan(meet, (totals, home), (jnp.arange(len(real)), texts, real))[0]
