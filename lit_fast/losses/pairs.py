"""Which pairs of a batch are positive, negative, or left out of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.config import LossConfig
from lit_fast.runtime import AXIS


class Images(NamedTuple):
    """The images of a device, which travel; what a configuration does not need is None."""

    features: jax.Array  # float32 or bfloat16 [n, width], normalised; n is equal on all devices
    rows: jax.Array  # int32 [n], of the dataset
    places: jax.Array | None = None  # int32 [n], in the global batch
    captions: jax.Array | None = None  # uint32 [n, captions, 2], hashes of the image's own captions
    lots: jax.Array | None = None  # uint32 [n], random


class Texts(NamedTuple):
    """What tells the texts of a device apart; they stay at home."""

    rows: jax.Array  # int32 [m], of the dataset
    places: jax.Array | None = None  # int32 [m], of the text's own image in the global batch
    captions: jax.Array | None = None  # uint32 [m, 2], hash
    lots: jax.Array | None = None  # uint32 [m], random


def pair_up(
    config: LossConfig,
    devices: int,
    features: jax.Array,
    rows: jax.Array,
    captions: int,
    ids: Callable[[], jax.Array],
    words: jax.Array,
) -> tuple[Images, Texts]:
    """The images and texts of this device; to be called inside `jax.shard_map` over the mesh axis.

    Args:
      config: decides what is needed.
      devices: on the mesh axis.
      features: float32 or bfloat16 [n, width], normalised.
      rows: int32 [n].
      captions: of an image.
      ids: gives integer [n * captions, length], the captions of an image side by side, if they are needed.
      words: uint32 [2], random, the same on all devices.
    """
    n, m = len(rows), len(rows) * captions
    images, texts = Images(features, rows), Texts(jnp.repeat(rows, captions))
    device = lax.axis_index(AXIS)
    places = device * n + jnp.arange(n)
    if config.same_image == "mask":
        images, texts = images._replace(places=places), texts._replace(places=jnp.repeat(places, captions))
    if config.same_caption == "mask":
        hashes = hash_ids(ids())
        images = images._replace(captions=hashes.reshape(n, captions, 2))
        texts = texts._replace(captions=hashes)
    if config.negatives == "random" and _share(config, n * devices) < 1:
        text_places = device * m + jnp.arange(m)
        images = images._replace(lots=mix(mix(places.astype(jnp.uint32)) ^ words[0]))
        texts = texts._replace(lots=mix(mix(text_places.astype(jnp.uint32)) ^ words[1]))
    return images, texts


def sort_out(
    config: LossConfig, images: int, tile: Images, texts: Texts, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(positive, used), bool, broadcastable to [tile, m]; the used ones that are not positive are negative.

    Positive are the pairs of one row of the dataset: several captions of an image are all its positives.
    With `same_image = "mask"` they are positive at their own place only, and a pair of one row at two places
    is left out. With `same_caption = "mask"` a text is no negative of an image that came with the very same
    caption.

    Args:
      config: the rules.
      images: in the global batch.
      tile: of the visiting images.
      texts: at home.
      real: bool, broadcastable to [tile, m], False for filling.
    """
    used = real
    positive = used & (tile.rows[:, None] == texts.rows[None, :])
    if tile.places is not None and texts.places is not None:
        own = positive & (tile.places[:, None] == texts.places[None, :])
        used, positive = used & (own | ~positive), own
    if tile.captions is not None and texts.captions is not None:
        for k in range(tile.captions.shape[1]):
            equal = tile.captions[:, None, k] == texts.captions[None, :]
            used = used & (positive | ~(equal[..., 0] & equal[..., 1]))
    if tile.lots is not None and texts.lots is not None:
        bound = jnp.uint32(min(round(_share(config, images) * 2**32), 2**32 - 1))
        used = used & (positive | (mix(tile.lots[:, None] ^ texts.lots[None, :]) < bound))
    return positive, used


def hash_ids(ids: jax.Array) -> jax.Array:
    """64-bit hashes uint32 [m, 2] of ids integer [m, length].

    Each half mixes in one id after the other. Of a million different captions two have the same hash with a
    probability of 3e-8.
    """
    start = jnp.broadcast_to(jnp.array(_SALTS, jnp.uint32), (len(ids), 2))
    return lax.scan(lambda h, i: (mix(h ^ i[:, None]), None), start, ids.T.astype(jnp.uint32))[0]


_SALTS = (0x9E3779B9, 0x7F4A7C15)


def mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit depends on every other (MurmurHash3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _share(config: LossConfig, images: int) -> float:
    """The part of the negatives to keep: of the `images - 1` that each text has."""
    return config.negatives_per_positive / max(images - 1, 1)
