"""The softmax loss of CLIP and LiT: section 3.1 of the SigLIP paper."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.pairs import Images, Texts, sort_out
from lit_fast.losses.ring import go_round
from lit_fast.losses.sigmoid import Sums
from lit_fast.losses.statistics import add_logits, no_logits
from lit_fast.losses.tile import Trained, add, compare, gradients


class _Seen(NamedTuple):
    """Of the logits of each image, or each text, seen so far; all float32 [n]."""

    highest: jax.Array
    total: jax.Array  # of exp(logit - highest)
    positives: jax.Array  # how many


def softmax_sums(config: LossConfig, devices: int, trained: Trained, images: Images, texts: Texts) -> Sums:
    """This device's share of the loss, its gradients and logits, in two rounds.

    The shares add up to half the mean over the images of the cross-entropy of an image's softmax over the
    texts, plus half the mean over the texts of that of a text's softmax over the images. The target of an
    image is the uniform distribution over its positives, that of a text likewise; with one caption per image
    and no row twice this is the loss of CLIP. Every image has a positive in the batch. Pairs that are left
    out appear in no softmax.

    The first round finds the normalisers: a text's at home, an image's travels with it and grows on the way.
    """
    scale = jnp.exp(trained.log_scale)
    here, text_count = len(images.rows), len(texts.rows) * devices
    count = here * devices

    def look(home: _Seen, block: Images, visitor: _Seen, real: jax.Array) -> tuple[_Seen, _Seen]:
        positive, used = sort_out(config, count, block, texts, real)
        logit = jnp.where(used, scale * compare(config.precision, trained, block.features).cosine, -jnp.inf)
        return _see(home, logit, positive, 0), _see(visitor, logit, positive, 1)

    text_seen, image_seen = go_round(
        devices, config.tile, look, _nothing(len(texts.rows)), images, _nothing(here)
    )
    text_normaliser = _normaliser(text_seen)
    text_share = 0.5 / text_count / text_seen.positives
    image_share = 0.5 / count / image_seen.positives

    def visit(
        sums: Sums, visitor: tuple[Images, jax.Array, jax.Array], _: None, real: jax.Array
    ) -> tuple[Sums, None]:
        loss, grads, logits = sums
        block, normaliser, share = visitor
        tile = compare(config.precision, trained, block.features)
        positive, used = sort_out(config, count, block, texts, real)
        logit = scale * tile.cosine
        of_image = logit - normaliser[:, None]  # logarithm of the image's probability of the text
        of_text = logit - text_normaliser
        wrong = jnp.where(positive, share[:, None] * of_image + text_share * of_text, 0.0)
        target = jnp.where(positive, share[:, None] + text_share, 0.0)
        slope = 0.5 / count * jnp.exp(of_image) + 0.5 / text_count * jnp.exp(of_text) - target
        slope = jnp.where(used, slope, 0.0)
        return (
            loss - jnp.sum(wrong),
            add(grads, gradients(config.precision, trained, tile, scale, slope)),
            add_logits(logits, logit, positive, used),
        ), None

    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (trained.log_scale, trained))
    visitors = (images, _normaliser(image_seen), image_share)
    sums, _ = go_round(devices, config.tile, visit, (*zero, no_logits()), visitors)
    return sums


def _nothing(n: int) -> _Seen:
    return _Seen(jnp.full(n, -jnp.inf), jnp.zeros(n), jnp.zeros(n))


def _see(seen: _Seen, logit: jax.Array, positive: jax.Array, axis: int) -> _Seen:
    highest = jnp.maximum(seen.highest, jnp.max(logit, axis))
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)  # nothing but pairs that are left out, so far
    total = seen.total * jnp.exp(seen.highest - shift)
    total += jnp.sum(jnp.exp(logit - jnp.expand_dims(shift, axis)), axis)
    return _Seen(highest, total, seen.positives + jnp.sum(positive, axis, dtype=jnp.float32))


def _normaliser(seen: _Seen) -> jax.Array:
    return seen.highest + jnp.log(seen.total)
