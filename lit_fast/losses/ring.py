"""The ring: what belongs to the images travels from device to device, everything else stays at home.

Section 3.3 of the SigLIP paper sends blocks of one side round the devices. With frozen image features it can
be done with half the traffic: the texts and all gradients stay, and nothing has to come back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.runtime import AXIS

# Pairs a tile at a time: images by texts, so many that what a tile needs stays in the processor's cache.


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


Visit = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


def go_round(devices: int, tile: int, visit: Visit, home: Any, block: Any, luggage: Any = None) -> Any:
    """Have every tile of every device visit this one: (home, luggage) afterwards.

    To be called inside `jax.shard_map` over the mesh axis.

    Args:
      devices: on the mesh axis.
      tile: images at a time, at most; it decides the memory, not the result.
      visit: (home, tile of the block, tile of the luggage, real bool [tile]) -> (home, luggage); what is not
        real is the filling of a block's last tile.
      home: stays here, any tree.
      block: tree of arrays [n, ...] of this device, n equal on all; it travels and does not change.
      luggage: likewise, but changed by every visit; it comes home in the end, which is one hop more.
    """
    n = len(jax.tree.leaves(block)[0])
    (block, luggage), real = cut(tile, (block, luggage))

    def send(tree: Any) -> Any:
        right = [(i, (i + 1) % devices) for i in range(devices)]
        return jax.tree.map(lambda a: lax.ppermute(a, AXIS, right), tree) if devices > 1 else tree

    def meet(home: Any, block: Any, luggage: Any) -> tuple[Any, Any]:
        return lax.scan(lambda home, xs: visit(home, *xs), home, (block, luggage, real))

    def turn(state: tuple, _: None) -> tuple[tuple, None]:
        home, block, luggage = state
        # Sent before the block is used, so that the transfer hides behind the matrix products.
        after = send(block)
        home, luggage = meet(home, block, luggage)
        return (home, after, send(luggage)), None

    # The block's last hop brings it home for nothing; a last turn without it would have to be compiled apart,
    # which takes as long again.
    (home, _, luggage), _ = lax.scan(turn, (home, block, luggage), None, length=devices)
    return home, join(n, luggage)
