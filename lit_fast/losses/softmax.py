"""The softmax loss of CLIP and LiT: section 3.1 of the SigLIP paper."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.accumulate import Judged, Pairs, Sums, Trained, cosines, embed, pair_sums
from lit_fast.losses.pairs import Images, Texts, sort_out
from lit_fast.losses.ring import cut_texts, go_round, join, meet_texts


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
    home, real_texts = cut_texts(config.tile, (trained.texts, texts))

    def look(seen: _Seen, block: Images, visitor: _Seen, real: jax.Array) -> tuple[_Seen, _Seen]:
        embedded = embed(config.precision, trained.head, block.features).images

        def meet(
            visitor: _Seen, seen: _Seen, met: tuple[jax.Array, Texts], real_texts: jax.Array
        ) -> tuple[_Seen, _Seen]:
            positive, used = sort_out(config, count, block, met[1], real[:, None] & real_texts)
            logit = jnp.where(used, scale * cosines(config.precision, embedded, met[0]), -jnp.inf)
            return _see(visitor, logit, positive, 1), _see(seen, logit, positive, 0)

        visitor, seen = meet_texts(meet, visitor, seen, home, real_texts)
        return seen, visitor

    text_seen, image_seen = go_round(
        devices, config.tile, look, _nothing(real_texts.shape), images, _nothing((here,))
    )
    text_seen = join(len(texts.rows), text_seen)
    of_images = _normaliser(image_seen), 0.5 / count / image_seen.positives
    of_texts = _normaliser(text_seen), 0.5 / text_count / text_seen.positives

    def formula(
        pairs: Pairs, of_images: tuple[jax.Array, jax.Array], of_texts: tuple[jax.Array, jax.Array]
    ) -> Judged:
        (normaliser, share), (text_normaliser, text_share) = of_images, of_texts
        logit = scale * pairs.cosine
        of_image = logit - normaliser[:, None]  # logarithm of the image's probability of the text
        of_text = logit - text_normaliser
        wrong = jnp.where(pairs.positive, share[:, None] * of_image + text_share * of_text, 0.0)
        target = jnp.where(pairs.positive, share[:, None] + text_share, 0.0)
        slope = 0.5 / count * jnp.exp(of_image) + 0.5 / text_count * jnp.exp(of_text) - target
        return Judged(-jnp.sum(wrong), jnp.where(pairs.used, slope, 0.0), logit, pairs.used)

    return pair_sums(config, devices, trained, images, texts, formula, of_images, of_texts)


def _nothing(shape: tuple[int, ...]) -> _Seen:
    return _Seen(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape))


def _see(seen: _Seen, logit: jax.Array, positive: jax.Array, axis: int) -> _Seen:
    highest = jnp.maximum(seen.highest, jnp.max(logit, axis))
    shift = jnp.where(highest == -jnp.inf, 0.0, highest)  # nothing but pairs that are left out, so far
    total = seen.total * jnp.exp(seen.highest - shift)
    total += jnp.sum(jnp.exp(logit - jnp.expand_dims(shift, axis)), axis)
    return _Seen(highest, total, seen.positives + jnp.sum(positive, axis, dtype=jnp.float32))


def _normaliser(seen: _Seen) -> jax.Array:
    return seen.highest + jnp.log(seen.total)
