"""The contrastive loss of a configuration, and the pairwise sigmoid formula (section 3.2 of the SigLIP paper)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.accumulate import LogitStats, LossAndGrads, LossParams, TileLoss, accumulate_pair_loss
from lit_fast.losses.negatives import hardness, hardness_threshold
from lit_fast.losses.pairs import ImageSide, PairTile, TextSide
from lit_fast.losses.softmax import softmax_loss

DEFAULT_TILE = 512  # for `tile = 0`, where a training has not chosen by platform (`lit_fast.train.sizes`)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def contrastive_loss(
    config: LossConfig, num_devices: int, params: LossParams, images: ImageSide, texts: TextSide
) -> tuple[jax.Array, LogitStats]:
    """Compute this device's share of the loss: its texts against the images of all devices.

    The shares of all devices add up to the loss of the global batch, see `sigmoid_loss` and `softmax_loss`.
    Differentiable in `params`, which has the image embeddings where they are trained. The gradients are formed in the
    forward pass, tile by tile, so nothing is stored for the backward pass. Call it inside `shard_map` over the mesh
    axis.

    Args:
      config: formula, pairs and tile size.
      num_devices: size of the mesh axis.
      params: embeddings of this device's texts, temperature, bias, and image head or image embeddings.
      images: the images of this device, from `make_sides`.
      texts: the texts of this device, likewise.

    Returns:
      The share of the loss, float32 [], and the statistics of its logits.
    """
    loss, _, stats = _loss_and_grads(config, num_devices, params, images, texts)
    return loss, stats


def _loss_and_grads(
    config: LossConfig, num_devices: int, params: LossParams, images: ImageSide, texts: TextSide
) -> LossAndGrads:
    if not config.tile:
        config = replace(config, tile=DEFAULT_TILE)
    loss = softmax_loss if config.name == "softmax" else sigmoid_loss
    return loss(config, num_devices, params, images, texts)


def _forward(
    config: LossConfig, num_devices: int, params: LossParams, images: ImageSide, texts: TextSide
) -> tuple[tuple[jax.Array, LogitStats], LossParams]:
    loss, grads, stats = _loss_and_grads(config, num_devices, params, images, texts)
    return (loss, stats), grads


def _backward(
    config: LossConfig, num_devices: int, grads: LossParams, cotangents: tuple[jax.Array, LogitStats]
) -> tuple[LossParams, None, None]:
    return jax.tree.map(lambda a: cotangents[0] * a, grads), None, None


contrastive_loss.defvjp(_forward, _backward)


def sigmoid_loss(
    config: LossConfig, num_devices: int, params: LossParams, images: ImageSide, texts: TextSide
) -> LossAndGrads:
    """Compute this device's share of the sigmoid loss in one scan of the ring.

    The loss is `sum over used pairs of softplus(-label * logit) / number of images`, where
    `logit = exp(log_scale) * cosine + bias` and the label is +1 for positive and -1 for negative pairs. Masked
    negatives do not change the divisor.
    """
    scale = jnp.exp(params.log_scale)
    bias = 0.0 if params.bias is None else params.bias
    num_images = len(images.rows) * num_devices
    selected = config.negatives in ("hardest", "easiest")
    threshold = hardness_threshold(config, num_devices, params, images, texts) if selected else None

    def pair_loss(pairs: PairTile, _: None, __: None) -> TileLoss:
        positive, used = pairs.positive, pairs.used
        if threshold is not None:
            used = used & (positive | (hardness(config, pairs.cosine) >= threshold))
        logits = scale * pairs.cosine + bias
        softplus, sigmoid = _softplus_and_sigmoid(jnp.where(positive, -logits, logits))
        dlogits = jnp.where(used, jnp.where(positive, -sigmoid, sigmoid), 0.0)
        return TileLoss(jnp.sum(jnp.where(used, softplus, 0.0)), dlogits, logits, used)

    loss, grads, stats = accumulate_pair_loss(config, num_devices, params, images, texts, pair_loss)
    loss, grads = jax.tree.map(lambda a: a / num_images, (loss, grads))
    return LossAndGrads(loss, grads, stats)


def _softplus_and_sigmoid(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute softplus(x) and its derivative sigmoid(x) from one exponential that cannot overflow."""
    exp = jnp.exp(-jnp.abs(x))
    return jnp.maximum(x, 0.0) + jnp.log1p(exp), jnp.where(x >= 0, 1.0, exp) / (1 + exp)
