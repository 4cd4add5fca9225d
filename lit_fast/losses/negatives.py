"""Only the hardest or the easiest negatives of a batch (section 4.8 of the SigLIP paper)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.config import LossConfig
from lit_fast.losses.accumulate import Trained, cosines, embed
from lit_fast.losses.pairs import Images, Texts, sort_out
from lit_fast.losses.ring import cut_texts, go_round, meet_texts
from lit_fast.runtime import AXIS

_CUTS = 64
_PASSES = 3


def hardness(config: LossConfig, cosine: jax.Array) -> jax.Array:
    """What the negatives are ranked by; as the loss of a negative grows with its logit, its cosine will do."""
    return cosine if config.negatives == "hardest" else -cosine


def threshold(config: LossConfig, devices: int, trained: Trained, images: Images, texts: Texts) -> jax.Array:
    """The hardness float32 [] from which on the negatives of the global batch are kept.

    Sorting all pairs would need a batch x batch buffer. Instead the negatives above 64 cuts are counted on
    all devices and the search goes on between two of the cuts, three times: the images go round three times
    more. At least `negatives_per_positive` times the texts are kept, and more only by those within
    2.02 / 65**3 = 7.4e-6 of the threshold, a rounding of the logits.
    """
    count = len(images.rows) * devices
    wanted = config.negatives_per_positive * len(texts.rows) * devices
    home, real_texts = cut_texts(config.tile, (trained.texts, texts))

    def narrow(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        edges = jnp.linspace(low, high, _CUTS + 2)

        def visit(above: jax.Array, block: Images, _: None, real: jax.Array) -> tuple[jax.Array, None]:
            images = embed(config.precision, trained.head, block.features).images

            def meet(
                above: jax.Array, _: None, met: tuple[jax.Array, Texts], real_texts: jax.Array
            ) -> tuple[jax.Array, None]:
                rank = hardness(config, cosines(config.precision, images, met[0]))
                positive, used = sort_out(config, count, block, met[1], real[:, None] & real_texts)
                rank = jnp.where(used & ~positive, rank, -jnp.inf)
                # One fused comparison and reduction; float32 over the tiles, as int32 ends at 2^31 pairs.
                return above + jnp.sum(rank[..., None] >= edges[1:-1], axis=(0, 1), dtype=jnp.int32), None

            return meet_texts(meet, above, None, home, real_texts)

        above, _ = go_round(devices, config.tile, visit, jnp.zeros(_CUTS, jnp.float32), images)
        place = jnp.sum(lax.psum(above, AXIS) >= wanted)
        return edges[place], edges[place + 1]

    # Low precision may give a cosine above 1.
    low, high = jnp.float32(-1.01), jnp.float32(1.01)
    for _ in range(_PASSES):
        low, high = narrow(low, high)
    return low
