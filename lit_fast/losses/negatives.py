"""Only the hardest or the easiest negatives of a batch (section 4.8 of the SigLIP paper)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.config import LossConfig
from lit_fast.losses.accumulate import LossParams
from lit_fast.losses.pairs import (
    ImageSide,
    TextSide,
    TextTile,
    make_image_tile,
    make_pair_tile,
    make_text_tiles,
)
from lit_fast.losses.ring import ring_scan, scan_text_tiles
from lit_fast.runtime import AXIS

_CUTS = 64  # per pass
_PASSES = 3


def hardness(config: LossConfig, cosine: jax.Array) -> jax.Array:
    """Return the key that negatives are ranked by; the loss of a negative grows with its cosine."""
    return cosine if config.negatives == "hardest" else -cosine


def hardness_threshold(
    config: LossConfig, num_devices: int, params: LossParams, images: ImageSide, texts: TextSide
) -> jax.Array:
    """Find the hardness, float32 [], from which on negatives of the global batch are used.

    Sorting all pairs would need an array of batch x batch. Instead each of three passes over the ring counts the
    negatives above 64 cuts and narrows the search to the interval between two cuts. At least
    `negatives_per_positive` negatives per text are used; additional ones lie within 2.02 / 65**3 = 7.4e-6 of the
    threshold, which is about the rounding of the logits.
    """
    num_images = len(images.rows) * num_devices
    wanted = config.negatives_per_positive * len(texts.rows) * num_devices
    text_tiles = make_text_tiles(config, params.texts, texts)

    def count_above(cuts: jax.Array) -> jax.Array:
        """Count the negatives of the global batch at or above each cut; float32, as int32 ends at 2^31 pairs."""

        def block_body(
            counts: jax.Array, block: ImageSide, _: None, valid: jax.Array
        ) -> tuple[jax.Array, None]:
            image_tile = make_image_tile(config, params.head, block, valid)[0]

            def tile_body(counts: jax.Array, _: None, text_tile: TextTile) -> tuple[jax.Array, None]:
                pairs = make_pair_tile(config, num_images, image_tile, text_tile)
                negative = pairs.used & ~pairs.positive
                rank = jnp.where(negative, hardness(config, pairs.cosine), -jnp.inf)
                # XLA fuses comparison and reduction.
                return counts + jnp.sum(rank[..., None] >= cuts, axis=(0, 1), dtype=jnp.int32), None

            return scan_text_tiles(tile_body, counts, None, text_tiles)

        counts, _ = ring_scan(num_devices, config.tile, block_body, jnp.zeros(_CUTS, jnp.float32), images)
        return lax.psum(counts, AXIS)

    low, high = jnp.float32(-1.01), jnp.float32(1.01)  # low precision may give a cosine above 1
    for _ in range(_PASSES):
        edges = jnp.linspace(low, high, _CUTS + 2)
        interval = jnp.sum(count_above(edges[1:-1]) >= wanted)
        low, high = edges[interval], edges[interval + 1]
    return low
