"""Loss, gradients and logit statistics of all pairs, summed over the tiles of the ring.

A loss formula (`PairLossFn`) maps one tile of pairs to its loss and the derivative by each logit. Gradients are formed
in the same pass: nothing is stored for a backward pass, and no array of batch x batch exists. Therefore a loss may
depend on embeddings, temperature and bias only through `logits = scale * cosine + bias`; a weight that is computed from
`PairTile.cosine` counts as a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.pairs import (
    ImageSide,
    PairTile,
    TextSide,
    TextTile,
    einsum,
    make_image_tile,
    make_pair_tile,
    make_text_tiles,
)
from lit_fast.losses.ring import from_tiles, ring_scan, scan_text_tiles


class LossParams(NamedTuple):
    """What a loss is differentiated by. Gradients have the same structure."""

    texts: jax.Array  # float32 [m, width], normalized embeddings of this device's texts
    log_scale: jax.Array  # float32 [], logarithm of the temperature
    bias: jax.Array | None = None  # float32 []
    head: jax.Array | None = None  # float32 [width, width], applied to the image features
    # float32 [n, width], the features of `ImageSide` where they are trained; without a head then
    images: jax.Array | None = None


# --- statistics of the logits


class LogitSums(NamedTuple):
    """Sums over used pairs, each float32 []."""

    num_positives: jax.Array
    num_negatives: jax.Array
    positives: jax.Array
    negatives: jax.Array


class LogitMaxima(NamedTuple):
    """Maxima over used pairs, each float32 []; minima are negated, so that one `pmax` serves all four."""

    positives: jax.Array
    negatives: jax.Array
    negated_positives: jax.Array
    negated_negatives: jax.Array


class LogitStats(NamedTuple):
    """Statistics of the logits of used pairs."""

    sums: LogitSums
    maxima: LogitMaxima


def init_logit_stats() -> LogitStats:
    """Return the statistics of no pairs."""
    return LogitStats(LogitSums(*[jnp.zeros(())] * 4), LogitMaxima(*[jnp.full((), -jnp.inf)] * 4))


def update_logit_stats(
    stats: LogitStats, logits: jax.Array, positive: jax.Array, used: jax.Array
) -> LogitStats:
    """Add one tile: logits float32 [n, m], the booleans broadcastable to that."""
    sums, maxima = stats
    negative, positive = used & ~positive, positive & used

    def maximum(x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(mask, x, -jnp.inf))

    sums = LogitSums(
        sums.num_positives + jnp.sum(positive, dtype=jnp.int32),
        sums.num_negatives + jnp.sum(negative, dtype=jnp.int32),
        sums.positives + jnp.sum(jnp.where(positive, logits, 0.0)),
        sums.negatives + jnp.sum(jnp.where(negative, logits, 0.0)),
    )
    maxima = LogitMaxima(
        jnp.maximum(maxima.positives, maximum(logits, positive)),
        jnp.maximum(maxima.negatives, maximum(logits, negative)),
        jnp.maximum(maxima.negated_positives, maximum(-logits, positive)),
        jnp.maximum(maxima.negated_negatives, maximum(-logits, negative)),
    )
    return LogitStats(sums, maxima)


def logit_metrics(stats: LogitStats) -> dict[str, jax.Array]:
    """Return named metrics, float32 [], of the statistics of the global batch.

    Where there is no pair of a kind, the mean is NaN and minimum and maximum are infinite.
    """
    sums, maxima = stats
    return {
        "positive_logit_mean": sums.positives / sums.num_positives,
        "positive_logit_min": -maxima.negated_positives,
        "positive_logit_max": maxima.positives,
        "negative_logit_mean": sums.negatives / sums.num_negatives,
        "negative_logit_min": -maxima.negated_negatives,
        "negative_logit_max": maxima.negatives,
    }


# --- the sum over all tiles


class TileLoss(NamedTuple):
    """Loss of one tile of pairs."""

    loss: jax.Array  # float32 [], sum over the used pairs
    dlogits: jax.Array  # float32 [n, m], derivative of the loss by each logit, zero where a pair is not used
    logits: jax.Array  # float32 [n, m]
    used: jax.Array  # bool, broadcastable to [n, m]; a formula may mask more pairs than PairTile.used


class LossAndGrads(NamedTuple):
    """This device's share of the loss and its gradients; the shares of all devices add up."""

    loss: jax.Array  # float32 []
    grads: LossParams
    stats: LogitStats


PairLossFn = Callable[[PairTile, Any, Any], TileLoss]
"""A loss formula: (pairs, image_inputs of the tile, text_inputs of the tile) -> TileLoss."""


class _Sums(NamedTuple):
    """Sums over pairs."""

    loss: jax.Array  # float32 []
    dlogits: jax.Array  # float32 []
    stats: LogitStats


class _LocalCarry(NamedTuple):
    """State of this device."""

    sums: _Sums
    dtexts: jax.Array  # float32 [tiles, m, width], the gradient by the texts without the factor `scale`
    dhead: jax.Array | None  # float32 [width, width]


def accumulate_pair_loss(
    config: LossConfig,
    num_devices: int,
    params: LossParams,
    images: ImageSide,
    texts: TextSide,
    pair_loss: PairLossFn,
    image_inputs: Any = None,
    text_inputs: Any = None,
) -> LossAndGrads:
    """Sum a formula's loss, gradients and logit statistics over all pairs, in one scan of the ring.

    Args:
      config, num_devices, params, images, texts: as of `contrastive.contrastive_loss`.
      pair_loss: the formula.
      image_inputs: tree of arrays [n, ...] for the formula; they rotate with the images.
      text_inputs: tree of arrays [m, ...] for the formula.
    """
    scale, precision = jnp.exp(params.log_scale), config.precision
    num_images = len(images.rows) * num_devices
    text_tiles = make_text_tiles(config, params.texts, texts, text_inputs)

    def block_body(
        carry: _LocalCarry, block: tuple[ImageSide, Any], trained: jax.Array | None, valid: jax.Array
    ) -> tuple[_LocalCarry, jax.Array | None]:
        """Add the pairs of one image tile with all texts of this device.

        `trained` is the gradient by the tile's embeddings, where they are trained, without the factor `scale`. It
        rotates with the images, so that each device adds the part of its texts.
        """
        image_side, image_inputs = block
        image_tile, head_vjp = make_image_tile(config, params.head, image_side, valid)

        def tile_body(
            carry: tuple[_Sums, jax.Array | None], dtexts: jax.Array, text_tile: TextTile
        ) -> tuple[tuple[_Sums, jax.Array | None], jax.Array]:
            """Add the pairs of one image tile with one text tile; `dtexts` float32 [m, width] is of the latter."""
            sums, dimages = carry
            pairs = make_pair_tile(config, num_images, image_tile, text_tile)
            loss, dlogits, logits, used = pair_loss(pairs, image_inputs, text_tile.inputs)
            if dimages is not None:
                dimages += einsum(precision, "nm,md->nd", dlogits, text_tile.embeddings)
            sums = _Sums(
                sums.loss + loss,
                sums.dlogits + jnp.sum(dlogits),
                update_logit_stats(sums.stats, logits, pairs.positive, used),
            )
            return (sums, dimages), dtexts + einsum(precision, "nm,nd->md", dlogits, image_tile.embeddings)

        dimages = trained if head_vjp is None else jnp.zeros_like(image_tile.embeddings)
        (sums, dimages), dtexts = scan_text_tiles(tile_body, (carry.sums, dimages), carry.dtexts, text_tiles)
        dhead = carry.dhead
        if head_vjp is not None and dhead is not None:
            dhead += head_vjp(scale * dimages)[0]
        return _LocalCarry(sums, dtexts, dhead), dimages if head_vjp is None else None

    zero = jnp.zeros(())
    carry = _LocalCarry(
        _Sums(zero, zero, init_logit_stats()),
        jnp.zeros_like(text_tiles.embeddings),
        None if params.head is None else jnp.zeros_like(params.head),
    )
    trained = None if params.images is None else jnp.zeros_like(params.images)
    (sums, dtexts, dhead), dimages = ring_scan(
        num_devices, config.tile, block_body, carry, (images, image_inputs), trained
    )
    dtexts = from_tiles(len(params.texts), dtexts)
    grads = LossParams(
        texts=scale * dtexts,
        # sum of dlogits * scale * cosine over all pairs, without computing the cosines again
        log_scale=scale * jnp.sum(dtexts * params.texts),
        bias=None if params.bias is None else sums.dlogits,
        head=dhead,
        images=None if dimages is None else scale * dimages,
    )
    return LossAndGrads(sums.loss, grads, sums.stats)
