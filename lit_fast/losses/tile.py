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


class Tile(NamedTuple):
    """One tile of images against the texts of this device."""

    images: jax.Array  # float32 [tile, width], normalised
    cosine: jax.Array  # float32 [tile, m]
    pull_back: Callable | None  # from a gradient of `images` to that of the head


def compare(precision: str, trained: Trained, features: jax.Array) -> Tile:
    """The tile of normalised features [tile, width].

    The head is applied where the features arrive. Its gradient is linear in that of the image embeddings,
    so each device adds up its own part, and neither embeddings nor their gradients travel.
    """
    features = features.astype(trained.texts.dtype)
    pull_back = None
    if trained.head is not None:
        features, pull_back = jax.vjp(lambda w: apply_head(features, w, precision), trained.head)
    return Tile(features, _dot(precision)("nd,md->nm", features, trained.texts), pull_back)


def apply_head(features: jax.Array, head: jax.Array, precision: str) -> jax.Array:
    """Normalised image embeddings float32 [n, width] of normalised features and a head [width, width]."""
    # The filling of a tile is zero, where a norm has no gradient.
    known = jnp.any(features != 0, axis=-1, keepdims=True)
    linear = jnp.where(known, _dot(precision)("nd,de->ne", features, head), 1.0)
    return jnp.where(known, normalize(linear), 0.0)


def gradients(precision: str, trained: Trained, tile: Tile, scale: jax.Array, slope: jax.Array) -> Trained:
    """The part of one tile; `slope` float32 [tile, m] is the derivative of the loss by each logit."""
    dot = _dot(precision)
    head = None
    if tile.pull_back is not None:
        (head,) = tile.pull_back(scale * dot("nm,md->nd", slope, trained.texts))
    return Trained(
        texts=scale * dot("nm,nd->md", slope, tile.images),
        log_scale=jnp.sum(slope * (scale * tile.cosine)),
        bias=None if trained.bias is None else jnp.sum(slope),
        head=head,
    )


def add(a: Trained, b: Trained) -> Trained:
    """The sum of two gradients."""
    return jax.tree.map(jnp.add, a, b)


def _dot(precision: str) -> Callable:
    return partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
