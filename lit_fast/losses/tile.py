"""The products of one tile of pairs: similarities, and gradients from the slopes of the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lit_fast.normalize import normalize


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
