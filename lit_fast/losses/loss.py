"""The loss that a configuration describes, with gradients formed in the forward pass."""

from __future__ import annotations

from functools import partial

import jax

from lit_fast.config import LossConfig
from lit_fast.losses.pairs import Images, Texts
from lit_fast.losses.sigmoid import sigmoid_sums
from lit_fast.losses.softmax import softmax_sums
from lit_fast.losses.statistics import Logits
from lit_fast.losses.sums import Sums
from lit_fast.losses.tile import Trained


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def pair_loss(
    config: LossConfig, devices: int, trained: Trained, images: Images, texts: Texts
) -> tuple[jax.Array, Logits]:
    """This device's share of the loss, float32 [], and the logits of its pairs.

    Its texts against the images of all devices; the shares add up to the loss of the global batch, see
    `sigmoid_sums` and `softmax_sums`. Differentiable in `trained`; the image features are frozen. The texts
    and all gradients stay at home and are formed in the forward pass, tile by tile, so nothing is kept for
    the backward pass and no array of batch x batch exists.

    To be called inside `jax.shard_map` over the mesh axis.

    Args:
      config: which loss, which pairs, in which tiles.
      devices: on the mesh axis.
      trained: embeddings of the device's texts, temperature, bias (None: none) and image head (None: none).
      images: features of this device and what tells them apart, from `pair_up`.
      texts: what tells the texts apart, likewise.
    """
    loss, _, logits = _sums(config, devices, trained, images, texts)
    return loss, logits


def _sums(config: LossConfig, devices: int, trained: Trained, images: Images, texts: Texts) -> Sums:
    sums = softmax_sums if config.name == "softmax" else sigmoid_sums
    return sums(config, devices, trained, images, texts)


def _forward(
    config: LossConfig, devices: int, trained: Trained, images: Images, texts: Texts
) -> tuple[tuple[jax.Array, Logits], Trained]:
    loss, grads, logits = _sums(config, devices, trained, images, texts)
    return (loss, logits), grads


def _backward(config: LossConfig, devices: int, grads: Trained, g: tuple[jax.Array, Logits]) -> tuple:
    return jax.tree.map(lambda a: g[0] * a, grads), None, None


pair_loss.defvjp(_forward, _backward)
