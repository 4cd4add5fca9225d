"""The ring: image blocks rotate over the devices; text embeddings and their gradients stay.

Section 3.3 of the SigLIP paper rotates one side's embeddings and returns their gradients: so do trained image
embeddings, whose gradients rotate with them and come back as the sum over all devices. Frozen image features need no
gradients, so that rotating them takes half the traffic.

The `n` images and `m` texts of a device are split into tiles, so that the pairs of one tile fit in the processor's
cache. Arrays [n, ...] become [tiles, tile, ...]; the last tile is padded with zeros, and `valid` bool [tiles, tile] is
False there. For device d of D, step s of the scan sees the image block of device (d - s) mod D:

    for step in range(num_devices):           ring_scan
        for image_tile in block:              ring_scan     body(local_carry, block, ring_carry, valid)
            for text_tile in texts:           scan_text_tiles
                loss and gradients of image_tile x text_tile
        block, ring_carry = rotate(block), rotate(ring_carry)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.runtime import AXIS

_TEXTS_PER_IMAGE = 2  # a tile of pairs has twice as many texts as images


def to_tiles(tile_size: int, tree: Any) -> tuple[Any, jax.Array]:
    """Split arrays [n, ...] into tiles of equal size, at most `tile_size`.

    Returns:
      The tree with arrays [tiles, tile, ...], zero where padded, and `valid`, bool [tiles, tile].
    """
    n = len(jax.tree.leaves(tree)[0])
    num_tiles = -(-n // tile_size)
    tile = -(-n // num_tiles)
    padding = num_tiles * tile - n

    def split(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(num_tiles, tile, *a.shape[1:])

    return jax.tree.map(split, tree), split(jnp.ones(n, bool))


def to_text_tiles(tile_size: int, tree: Any) -> tuple[Any, jax.Array]:
    """Split arrays [m, ...] of texts like `to_tiles`; `tile_size` counts images."""
    return to_tiles(_TEXTS_PER_IMAGE * tile_size, tree)


def from_tiles(n: int, tree: Any) -> Any:
    """Join tiles [tiles, tile, ...] to arrays [n, ...], without the padding."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], tree)


class RingCarry(NamedTuple):
    """Carry of the scan over the ring."""

    local_carry: Any  # any tree; stays on this device
    block: Any  # arrays [tiles, tile, ...]: the images of one device; rotates, read-only
    ring_carry: Any  # arrays [tiles, tile, ...]: rotates with the block, updated on every device


RingBody = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


def ring_scan(
    num_devices: int,
    tile_size: int,
    body: RingBody,
    local_carry: Any,
    ring_block: Any,
    ring_carry: Any = None,
) -> tuple[Any, Any]:
    """Scan `body` over the image tiles of all devices, rotating image blocks around the ring.

    Call it inside `shard_map` over the mesh axis.

    Args:
      num_devices: size of the mesh axis.
      tile_size: maximum number of images of a tile. It changes memory and speed, not the result.
      body: (local_carry, block tile, ring_carry tile, valid bool [tile]) -> (local_carry, ring_carry tile).
      local_carry: any tree; stays on this device.
      ring_block: tree of arrays [n, ...], the images of this device; n is equal on all devices.
      ring_carry: tree of arrays [n, ...], state of these images that `body` updates on every device.

    Returns:
      The final (local_carry, ring_carry), the latter of this device's own images.
    """
    n = len(jax.tree.leaves(ring_block)[0])
    (block_tiles, ring_tiles), valid = to_tiles(tile_size, (ring_block, ring_carry))

    def ring_step(carry: RingCarry, _: None) -> tuple[RingCarry, None]:
        # The transfer starts before the block is used, so that it overlaps with the matrix products.
        next_block = _rotate(num_devices, carry.block)
        local_carry, ring_tiles = lax.scan(
            lambda local_carry, tile: body(local_carry, *tile),
            carry.local_carry,
            (carry.block, carry.ring_carry, valid),
        )
        return RingCarry(local_carry, next_block, _rotate(num_devices, ring_tiles)), None

    # The last rotation of the block is superfluous. A last step without it would be compiled separately, which doubles
    # the compile time.
    carry, _ = lax.scan(ring_step, RingCarry(local_carry, block_tiles, ring_tiles), length=num_devices)
    return carry.local_carry, from_tiles(n, carry.ring_carry)


def _rotate(num_devices: int, tree: Any) -> Any:
    """Send all arrays to the next device of the ring."""
    if num_devices == 1:
        return tree
    permutation = [(i, (i + 1) % num_devices) for i in range(num_devices)]
    return jax.tree.map(lambda a: lax.ppermute(a, AXIS, permutation), tree)


def scan_text_tiles(
    body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, text_carry: Any, text_tiles: Any
) -> tuple[Any, Any]:
    """Scan `body` over the text tiles of this device.

    Args:
      body: (carry, text_carry tile, text tile) -> (carry, text_carry tile).
      carry: any tree.
      text_carry: tree of arrays [tiles, tile, ...]; updated in place, so that no second copy exists.
      text_tiles: tree of arrays [tiles, tile, ...]; read-only.

    Returns:
      The final (carry, text_carry).
    """

    def step(state: tuple[Any, Any], inputs: tuple[jax.Array, Any]) -> tuple[tuple[Any, Any], None]:
        carry, text_carry = state
        i, text_tile = inputs
        carry, updated = body(carry, jax.tree.map(lambda a: a[i], text_carry), text_tile)
        return (carry, jax.tree.map(lambda a, b: a.at[i].set(b), text_carry, updated)), None

    num_tiles = len(jax.tree.leaves(text_tiles)[0])
    return lax.scan(step, (carry, text_carry), (jnp.arange(num_tiles), text_tiles))[0]
