"""The image and text sides of a batch, their tiles, and which pairs are positive, negative or masked.

Pairs of one dataset row are positive: several captions of an image are all its positives, and so are the captions of
the same row at another position of the batch. Texts of a near-duplicate image may be positive or masked as well; for
that the features of a text's own image are on its device, and the cosines of images are computed tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.config import LossConfig
from lit_fast.losses.ring import to_text_tiles
from lit_fast.runtime import AXIS
from lit_fast.utils.normalize import normalize

_SALTS = (0x9E3779B9, 0x7F4A7C15)


# --- both sides of a device


class ImageSide(NamedTuple):
    """The images of a device. Fields that the configuration does not need are None."""

    features: jax.Array  # float32 or bfloat16 [n, width], normalized; n is equal on all devices
    rows: jax.Array  # int32 [n], rows of the dataset
    captions: jax.Array | None = None  # uint32 [n, captions per image, 2], hashes of the image's captions
    random_ids: jax.Array | None = None  # uint32 [n]


class TextSide(NamedTuple):
    """The texts of a device without their embeddings; fields as of `ImageSide`."""

    rows: jax.Array  # int32 [m], row of the text's image
    captions: jax.Array | None = None  # uint32 [m, 2], hash of the text
    random_ids: jax.Array | None = None  # uint32 [m]
    features: jax.Array | None = None  # float32 or bfloat16 [m, width], of the text's image


def make_sides(
    config: LossConfig,
    num_devices: int,
    features: jax.Array,
    rows: jax.Array,
    captions_per_image: int,
    ids: Callable[[], jax.Array],
    seeds: jax.Array,
) -> tuple[ImageSide, TextSide]:
    """Make both sides of this device's pairs; call it inside `shard_map` over the mesh axis.

    Args:
      config: decides which fields are needed.
      num_devices: size of the mesh axis.
      features: float32 or bfloat16 [n, width], normalized.
      rows: int32 [n].
      captions_per_image: m / n.
      ids: returns the token ids, integer [m, length], captions of an image consecutive; called if needed.
      seeds: uint32 [2], random, equal on all devices.
    """
    n, m = len(rows), len(rows) * captions_per_image
    images, texts = ImageSide(features, rows), TextSide(jnp.repeat(rows, captions_per_image))
    if config.same_caption == "mask":
        hashes = hash_ids(ids())
        images = images._replace(captions=hashes.reshape(n, captions_per_image, 2))
        texts = texts._replace(captions=hashes)
    if config.near_duplicates != "negative":
        texts = texts._replace(features=jnp.repeat(features, captions_per_image, axis=0))
    if config.negatives == "random" and _share(config, n * num_devices) < 1:
        device = lax.axis_index(AXIS)

        def random_ids(count: int, seed: jax.Array) -> jax.Array:
            positions = device * count + jnp.arange(count)  # in the global batch
            return mix(mix(positions.astype(jnp.uint32)) ^ seed)

        images = images._replace(random_ids=random_ids(n, seeds[0]))
        texts = texts._replace(random_ids=random_ids(m, seeds[1]))
    return images, texts


# --- tiles of images, texts and pairs


class ImageTile(NamedTuple):
    """n images."""

    embeddings: jax.Array  # float32 [n, width], normalized
    side: ImageSide
    valid: jax.Array  # bool [n]


class TextTile(NamedTuple):
    """m texts, or [tiles, m, ...] for all tiles of a device."""

    embeddings: jax.Array  # float32 [m, width], normalized
    side: TextSide
    valid: jax.Array  # bool [m]
    inputs: Any = None  # of the loss formula, arrays [m, ...]


class PairTile(NamedTuple):
    """All pairs of n images and m texts; the booleans are broadcastable to [n, m]."""

    cosine: jax.Array  # float32 [n, m]
    positive: jax.Array
    used: jax.Array


HeadVjp = Callable[[jax.Array], tuple[jax.Array]]


def make_image_tile(
    config: LossConfig, head: jax.Array | None, side: ImageSide, valid: jax.Array
) -> tuple[ImageTile, HeadVjp | None]:
    """Embed a tile of images; the head is applied on the device where the features are used.

    The gradient by the head is linear in that by the embeddings. So each device sums its own part, and neither
    embeddings nor their gradients rotate.

    Returns:
      The tile, and the function from a gradient by its embeddings to that by the head (None without a head).
    """
    features = side.features.astype(jnp.float32)
    if head is None:
        return ImageTile(features, side, valid), None
    embeddings, head_vjp = jax.vjp(lambda w: apply_head(features, w, config.precision), head)
    return ImageTile(embeddings, side, valid), head_vjp


def apply_head(features: jax.Array, head: jax.Array, precision: str) -> jax.Array:
    """Map features [n, width] by a head [width, width] to normalized embeddings, float32 [n, width]."""
    # The padding of a tile is zero, where a norm has no gradient.
    nonzero = jnp.any(features != 0, axis=-1, keepdims=True)
    linear = jnp.where(nonzero, einsum(precision, "nd,de->ne", features, head), 1.0)
    return jnp.where(nonzero, normalize(linear), 0.0)


def make_text_tiles(
    config: LossConfig, embeddings: jax.Array, side: TextSide, inputs: Any = None
) -> TextTile:
    """Split this device's texts into tiles, arrays [tiles, m, ...]."""
    (embeddings, side, inputs), valid = to_text_tiles(config.tile, (embeddings, side, inputs))
    return TextTile(embeddings, side, valid, inputs)


def make_pair_tile(config: LossConfig, num_images: int, images: ImageTile, texts: TextTile) -> PairTile:
    """Compare n images with m texts; `num_images` is the size of the global batch."""
    cosine = einsum(config.precision, "nd,md->nm", images.embeddings, texts.embeddings)
    valid = images.valid[:, None] & texts.valid
    return PairTile(cosine, *pair_masks(config, num_images, images.side, texts.side, valid))


def einsum(precision: str, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute a matrix product with float32 sums and output."""
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


# --- positive, negative and masked pairs


def pair_masks(
    config: LossConfig, num_images: int, images: ImageSide, texts: TextSide, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute which pairs of n images and m texts are positive and which are used.

    With `near_duplicates` a text of a near-duplicate of the image is positive, or masked.
    With `same_caption = "mask"` a text is no negative of an image that has an equal caption. With
    `negatives = "random"` each negative pair is used with the probability that the configuration asks for.

    Args:
      config: the rules.
      num_images: size of the global batch.
      images, texts: one tile each.
      valid: bool, broadcastable to [n, m], False for padding.

    Returns:
      (positive, used), bool, broadcastable to [n, m]. Used pairs that are not positive are negative.
    """
    used = valid
    positive = used & (images.rows[:, None] == texts.rows[None, :])
    if texts.features is not None:
        cosine = einsum(config.precision, "nd,md->nm", images.features, texts.features)
        near = used & (cosine >= config.near_duplicate_cosine)
        if config.near_duplicates == "positive":
            positive = positive | near
        else:
            used = used & (positive | ~near)
    if images.captions is not None and texts.captions is not None:
        for k in range(images.captions.shape[1]):
            equal = images.captions[:, None, k] == texts.captions[None, :]
            used = used & (positive | ~(equal[..., 0] & equal[..., 1]))
    if images.random_ids is not None and texts.random_ids is not None:
        bound = jnp.uint32(min(round(_share(config, num_images) * 2**32), 2**32 - 1))
        used = used & (positive | (mix(images.random_ids[:, None] ^ texts.random_ids[None, :]) < bound))
    return positive, used


def _share(config: LossConfig, num_images: int) -> float:
    """Return the share of the `num_images - 1` negatives of each text to use."""
    return config.negatives_per_positive / max(num_images - 1, 1)


def hash_ids(ids: jax.Array) -> jax.Array:
    """Hash token ids, integer [m, length], to 64 bits, uint32 [m, 2].

    Each half mixes in one id after the other. The probability that two of a million different captions have the same
    hash is 3e-8.
    """
    start = jnp.broadcast_to(jnp.array(_SALTS, jnp.uint32), (len(ids), 2))
    return lax.scan(lambda h, i: (mix(h ^ i[:, None]), None), start, ids.T.astype(jnp.uint32))[0]


def mix(x: jax.Array) -> jax.Array:
    """Apply MurmurHash3's finalizer: a bijection of uint32 in which every bit depends on every other."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
