"""Loss, gradients and logits of all pairs, added up tile by tile from what a formula says of each pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.pairs import Images, Texts, sort_out
from lit_fast.losses.ring import go_round
from lit_fast.losses.statistics import Logits, add_logits, no_logits
from lit_fast.losses.tile import Trained, by_images, by_texts, cosines, embed
from lit_fast.losses.tiling import cut_texts, join, meet_texts


class Pairs(NamedTuple):
    """One tile of pairs; the booleans are broadcastable to [n, m]."""

    cosine: jax.Array  # float32 [n, m]
    positive: jax.Array  # bool
    used: jax.Array  # bool


class Judged(NamedTuple):
    """What a formula says of a tile of pairs."""

    loss: jax.Array  # float32 [], of the used pairs
    slope: (
        jax.Array
    )  # float32 [n, m], the derivative of the loss by each logit, zero where a pair is not used
    logit: jax.Array  # float32 [n, m]
    used: jax.Array  # bool, broadcastable to [n, m]: a formula may leave out more pairs


Sums = tuple[jax.Array, Trained, Logits]
Formula = Callable[[Pairs, Any, Any], Judged]


def pair_sums(
    config: LossConfig,
    devices: int,
    trained: Trained,
    images: Images,
    texts: Texts,
    formula: Formula,
    of_images: Any = None,
    of_texts: Any = None,
) -> Sums:
    """This device's share of the loss, its gradients and the logits of its pairs, in one round.

    Args:
      config, devices, trained, images, texts: as of `pair_loss`.
      formula: (pairs, tile of `of_images`, tile of `of_texts`) -> Judged.
      of_images: tree of arrays [n, ...] that travel with the images, for the formula.
      of_texts: tree of arrays [m, ...], for the formula.
    """
    scale, precision = jnp.exp(trained.log_scale), config.precision
    count = len(images.rows) * devices
    home, real_texts = cut_texts(config.tile, (trained.texts, texts, of_texts))

    def visit(sums: tuple, visitor: tuple[Images, Any], _: None, real: jax.Array) -> tuple[tuple, None]:
        block, of_block = visitor
        loss, slopes, text_gradient, head_gradient, logits = sums
        embedded = embed(precision, trained.head, block.features)

        def meet(
            totals: tuple, gradient: jax.Array, met: tuple[jax.Array, Texts, Any], real_texts: jax.Array
        ) -> tuple[tuple, jax.Array]:
            loss, slopes, image_gradient, logits = totals
            texts, known, of_known = met
            cosine = cosines(precision, embedded.images, texts)
            positive, used = sort_out(config, count, block, known, real[:, None] & real_texts)
            judged = formula(Pairs(cosine, positive, used), of_block, of_known)
            if embedded.pull_back is not None:
                image_gradient += by_images(precision, judged.slope, texts)
            totals = (
                loss + judged.loss,
                slopes + jnp.sum(judged.slope),
                image_gradient,
                add_logits(logits, judged.logit, positive, judged.used),
            )
            return totals, gradient + by_texts(precision, judged.slope, embedded.images)

        none_yet = None if embedded.pull_back is None else jnp.zeros_like(embedded.images)
        totals = (loss, slopes, none_yet, logits)
        (loss, slopes, image_gradient, logits), text_gradient = meet_texts(
            meet, totals, text_gradient, home, real_texts
        )
        if embedded.pull_back is not None:
            head_gradient += embedded.pull_back(scale * image_gradient)[0]
        return (loss, slopes, text_gradient, head_gradient, logits), None

    zero = jnp.zeros(())
    head = None if trained.head is None else jnp.zeros_like(trained.head)
    sums = (zero, zero, jnp.zeros_like(home[0]), head, no_logits())
    (loss, slopes, text_gradient, head, logits), _ = go_round(
        devices, config.tile, visit, sums, (images, of_images)
    )
    text_gradient = join(len(trained.texts), text_gradient)
    return (
        loss,
        Trained(
            scale * text_gradient,
            # The sum of slope x scale x cosine over the pairs, without another look at them.
            scale * jnp.sum(text_gradient * trained.texts),
            None if trained.bias is None else slopes,
            head,
        ),
        logits,
    )
