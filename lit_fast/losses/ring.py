"""The ring: what belongs to the images travels from device to device, everything else stays at home.

Section 3.3 of the SigLIP paper sends blocks of one side round the devices. With frozen image features it can
be done with half the traffic: the texts and all gradients stay, and nothing has to come back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lit_fast.losses.tiling import cut, join
from lit_fast.mesh import AXIS

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
