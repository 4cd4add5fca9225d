"""The pairwise sigmoid loss as a frozen ring.

Section 3.3 of the SigLIP paper sends blocks of one side round the devices. With a frozen image side it
can be done with half the traffic and nothing kept for backward: the images travel, the texts and their
gradients stay at home, and the gradients are formed in the forward pass, tile by tile.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.mesh import AXIS

EPSILON = 1e-8


def normalize(x: jax.Array) -> jax.Array:
    """`x / (|x| + 1e-8)` along the last axis, in float32 (big_vision, two_towers.py)."""
    x = x.astype(jnp.float32)
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)


class Ring(NamedTuple):
    """How the pairs are worked through."""

    devices: int  # on the mesh axis
    tile: int = 1024  # images at a time; memory is tile x texts of the device, the result the same
    precision: str = "highest"  # of the similarity products: "default", "high" or "highest"


class _Sums(NamedTuple):
    loss: jax.Array
    texts: jax.Array
    log_scale: jax.Array
    bias: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sigmoid_loss(
    ring: Ring,
    texts: jax.Array,
    log_scale: jax.Array,
    bias: jax.Array,
    images: jax.Array,
    text_rows: jax.Array,
    image_rows: jax.Array,
) -> jax.Array:
    """This device's share of the loss, float32 []: its texts against the images of all devices.

    The shares add up to `sum over pairs of -log_sigmoid(label * logit) / images`, with
    `logit = exp(log_scale) * cosine + bias`; the label is +1 where text and image come from the same row of
    the dataset (several captions of an image are all its positives), else -1: section 3 of the SigLIP paper
    with any number of captions. Differentiable in texts, log_scale and bias; the images are frozen.

    To be called inside `jax.shard_map` over the mesh axis.

    Args:
      ring: how to work through the pairs.
      texts: float32 [m, width], normalised, of this device.
      log_scale: float32 [], logarithm of the temperature.
      bias: float32 [].
      images: float32 or bfloat16 [n, width], normalised, of this device; n is equal on all devices.
      text_rows: int32 [m], the dataset row of each text.
      image_rows: int32 [n], likewise, not negative.
    """
    return _ring_sums(ring, texts, log_scale, bias, images, text_rows, image_rows).loss


def _forward(ring: Ring, *args: jax.Array) -> tuple[jax.Array, _Sums]:
    sums = _ring_sums(ring, *args)
    return sums.loss, sums


def _backward(ring: Ring, sums: _Sums, g: jax.Array) -> tuple[jax.Array | None, ...]:
    return g * sums.texts, g * sums.log_scale, g * sums.bias, None, None, None


sigmoid_loss.defvjp(_forward, _backward)


def _ring_sums(
    ring: Ring,
    texts: jax.Array,
    log_scale: jax.Array,
    bias: jax.Array,
    images: jax.Array,
    text_rows: jax.Array,
    image_rows: jax.Array,
) -> _Sums:
    scale = jnp.exp(log_scale)
    count = images.shape[0] * ring.devices
    images, image_rows = _tiles(images, image_rows, ring.tile)
    dot = partial(jnp.einsum, precision=ring.precision, preferred_element_type=jnp.float32)

    def add_tile(sums: _Sums, tile: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
        x, rows = tile
        x = x.astype(texts.dtype)
        scaled = scale * dot("nd,md->nm", x, texts)
        label = jnp.where(rows[:, None] == text_rows[None, :], 1.0, -1.0)
        real = (rows >= 0)[:, None]  # not the padding of the last tile
        margin = label * (scaled + bias)
        slope = jnp.where(real, -label * jax.nn.sigmoid(-margin), 0.0)  # d loss / d logit
        return _Sums(
            sums.loss + jnp.sum(jnp.where(real, jax.nn.softplus(-margin), 0.0)),
            sums.texts + scale * dot("nm,nd->md", slope, x),
            sums.log_scale + jnp.sum(slope * scaled),
            sums.bias + jnp.sum(slope),
        ), None

    def add_device(sums: _Sums, block: tuple[jax.Array, jax.Array]) -> _Sums:
        return lax.scan(add_tile, sums, block)[0]

    def turn(carry: tuple, _: None) -> tuple[tuple, None]:
        sums, block = carry
        right = [(i, (i + 1) % ring.devices) for i in range(ring.devices)]
        # Sent before the block is used, so that the transfer hides behind the matrix products.
        after = jax.tree.map(lambda a: lax.ppermute(a, AXIS, right), block)
        return (add_device(sums, block), after), None

    zero = jnp.zeros((), jnp.float32)
    carry = (_Sums(zero, jnp.zeros(texts.shape, jnp.float32), zero, zero), (images, image_rows))
    if ring.devices > 1:
        carry, _ = lax.scan(turn, carry, None, length=ring.devices - 1)
    sums = add_device(*carry)
    return jax.tree.map(lambda a: a / count, sums)


def _tiles(images: jax.Array, rows: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """[n, width] and [n] as [tiles, tile, ...]; the last tile is filled up with rows of number -1."""
    n, width = images.shape
    tile = min(tile, n)
    fill = -n % tile
    images = jnp.pad(images, ((0, fill), (0, 0)))
    rows = jnp.pad(rows, (0, fill), constant_values=-1)
    return images.reshape(-1, tile, width), rows.reshape(-1, tile)
