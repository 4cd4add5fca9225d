"""The softmax loss of CLIP and LiT (section 3.1 of the SigLIP paper)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.accumulate import LossAndGrads, LossParams, TileLoss, accumulate_pair_loss
from lit_fast.losses.pairs import (
    ImageSide,
    PairTile,
    TextSide,
    TextTile,
    make_image_tile,
    make_pair_tile,
    make_text_tiles,
)
from lit_fast.losses.ring import from_tiles, ring_scan, scan_text_tiles


class LogSumExp(NamedTuple):
    """Running log-sum-exp of the logits of each image or text, float32 [n] each."""

    maximum: jax.Array
    total: jax.Array  # sum of exp(logit - maximum)
    num_positives: jax.Array

    @classmethod
    def init(cls, shape: tuple[int, ...]) -> LogSumExp:
        """Return the state before the first logit."""
        return cls(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape))

    def update(self, logits: jax.Array, positive: jax.Array, axis: int) -> LogSumExp:
        """Add the logits of a tile, reduced over `axis`; masked ones are -inf."""
        maximum = jnp.maximum(self.maximum, jnp.max(logits, axis))
        shift = jnp.where(maximum == -jnp.inf, 0.0, maximum)  # all pairs so far are masked
        total = self.total * jnp.exp(self.maximum - shift)
        total += jnp.sum(jnp.exp(logits - jnp.expand_dims(shift, axis)), axis)
        num_positives = self.num_positives + jnp.sum(positive, axis, dtype=jnp.float32)
        return LogSumExp(maximum, total, num_positives)

    def value(self) -> jax.Array:
        """Return log(sum of exp(logit))."""
        return self.maximum + jnp.log(self.total)


def softmax_loss(
    config: LossConfig, num_devices: int, params: LossParams, images: ImageSide, texts: TextSide
) -> LossAndGrads:
    """Compute this device's share of the softmax loss in two scans of the ring.

    The loss is half the mean over the images of the cross-entropy of an image's softmax over the texts, plus half the
    mean over the texts of that of a text's softmax over the images. Targets are uniform over the positives. With one
    caption per image and no repeated row this is the loss of CLIP. Masked pairs are in no softmax.

    The first scan computes the normalizers. Those of the texts stay on their device, those of the images rotate.
    """
    scale = jnp.exp(params.log_scale)
    num_images, num_texts = len(images.rows) * num_devices, len(texts.rows) * num_devices
    image_stats, text_stats = _normalizers(config, num_devices, params, images, texts)

    def pair_loss(
        pairs: PairTile, image_inputs: tuple[jax.Array, jax.Array], text_inputs: tuple[jax.Array, jax.Array]
    ) -> TileLoss:
        (image_lse, image_target), (text_lse, text_target) = image_inputs, text_inputs
        logits = scale * pairs.cosine
        log_p_image = logits - image_lse[:, None]  # of the text, by the image's softmax
        log_p_text = logits - text_lse  # of the image, by the text's softmax
        weighted = image_target[:, None] * log_p_image + text_target * log_p_text
        target = jnp.where(pairs.positive, image_target[:, None] + text_target, 0.0)
        dlogits = 0.5 / num_images * jnp.exp(log_p_image) + 0.5 / num_texts * jnp.exp(log_p_text) - target
        loss = -jnp.sum(jnp.where(pairs.positive, weighted, 0.0))
        return TileLoss(loss, jnp.where(pairs.used, dlogits, 0.0), logits, pairs.used)

    image_inputs = image_stats.value(), 0.5 / num_images / image_stats.num_positives
    text_inputs = text_stats.value(), 0.5 / num_texts / text_stats.num_positives
    return accumulate_pair_loss(
        config, num_devices, params, images, texts, pair_loss, image_inputs, text_inputs
    )


def _normalizers(
    config: LossConfig, num_devices: int, params: LossParams, images: ImageSide, texts: TextSide
) -> tuple[LogSumExp, LogSumExp]:
    """Compute the log-sum-exp of each image [n] over all texts and of each text [m] over all images."""
    scale = jnp.exp(params.log_scale)
    num_images = len(images.rows) * num_devices
    text_tiles = make_text_tiles(config, params.texts, texts)

    def block_body(
        text_stats: LogSumExp, block: ImageSide, image_stats: LogSumExp, valid: jax.Array
    ) -> tuple[LogSumExp, LogSumExp]:
        image_tile, _ = make_image_tile(config, params.head, block, valid)

        def stats_body(
            image_stats: LogSumExp, text_stats: LogSumExp, text_tile: TextTile
        ) -> tuple[LogSumExp, LogSumExp]:
            pairs = make_pair_tile(config, num_images, image_tile, text_tile)
            logits = jnp.where(pairs.used, scale * pairs.cosine, -jnp.inf)
            return image_stats.update(logits, pairs.positive, 1), text_stats.update(logits, pairs.positive, 0)

        image_stats, text_stats = scan_text_tiles(stats_body, image_stats, text_stats, text_tiles)
        return text_stats, image_stats

    text_stats, image_stats = ring_scan(
        num_devices,
        config.tile,
        block_body,
        LogSumExp.init(text_tiles.valid.shape),
        images,
        LogSumExp.init(images.rows.shape),
    )
    return image_stats, from_tiles(len(texts.rows), text_stats)
