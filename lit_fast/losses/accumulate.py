"""Loss, gradients and logits of all pairs, added up tile by tile from what a formula says of each pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.logit_stats import Logits, add_logits, no_logits
from lit_fast.losses.pairs import Images, Texts, sort_out
from lit_fast.losses.ring import cut_texts, go_round, join, meet_texts
from lit_fast.utils.normalize import normalize

# The products of one tile of pairs: similarities, and gradients from the slopes of the loss.


class Trained(NamedTuple):
    """What a loss is differentiated by; gradients have the same form."""

    texts: jax.Array  # float32 [m, width], normalised, of this device
    log_scale: jax.Array  # float32 [], logarithm of the temperature
    bias: jax.Array | None = None  # float32 []
    head: jax.Array | None = None  # float32 [width, width], of the images


class Embedded(NamedTuple):
    """One tile of images."""

    images: jax.Array  # float32 [tile, width], normalised
    pull_back: Callable | None  # from a gradient of `images` to that of the head


def embed(precision: str, head: jax.Array | None, features: jax.Array) -> Embedded:
    """The tile of normalised features float32 or bfloat16 [tile, width].

    The head is applied where the features arrive. Its gradient is linear in that of the image embeddings,
    so each device adds up its own part, and neither embeddings nor their gradients travel.
    """
    features = features.astype(jnp.float32)
    if head is None:
        return Embedded(features, None)
    images, pull_back = jax.vjp(lambda w: apply_head(features, w, precision), head)
    return Embedded(images, pull_back)


def apply_head(features: jax.Array, head: jax.Array, precision: str) -> jax.Array:
    """Normalised image embeddings float32 [n, width] of normalised features and a head [width, width]."""
    # The filling of a tile is zero, where a norm has no gradient.
    known = jnp.any(features != 0, axis=-1, keepdims=True)
    linear = jnp.where(known, _dot(precision)("nd,de->ne", features, head), 1.0)
    return jnp.where(known, normalize(linear), 0.0)


def cosines(precision: str, images: jax.Array, texts: jax.Array) -> jax.Array:
    """float32 [n, m] of normalised images [n, width] and texts [m, width]."""
    return _dot(precision)("nd,md->nm", images, texts)


def by_texts(precision: str, slope: jax.Array, images: jax.Array) -> jax.Array:
    """The gradient float32 [m, width] by the texts, from that by the cosines, `slope` float32 [n, m]."""
    return _dot(precision)("nm,nd->md", slope, images)


def by_images(precision: str, slope: jax.Array, texts: jax.Array) -> jax.Array:
    """The gradient float32 [n, width] by the images, likewise."""
    return _dot(precision)("nm,md->nd", slope, texts)


def _dot(precision: str) -> Callable:
    return partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)


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
