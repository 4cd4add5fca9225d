"""The loss that a configuration describes, with gradients formed in the forward pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.accumulate import Judged, Pairs, Sums, Trained, pair_sums
from lit_fast.losses.logit_stats import Logits
from lit_fast.losses.negatives import hardness, threshold
from lit_fast.losses.pairs import Images, Texts
from lit_fast.losses.softmax import softmax_sums

# The pairwise sigmoid loss: section 3.2 of the SigLIP paper.


def sigmoid_sums(config: LossConfig, devices: int, trained: Trained, images: Images, texts: Texts) -> Sums:
    """This device's share of the loss, its gradients and logits, in one round.

    The shares add up to `sum over used pairs of -log_sigmoid(label * logit) / images`, with
    `logit = exp(log_scale) * cosine + bias` and the label +1 for positive and -1 for negative pairs. Leaving
    out negatives does not change the divisor.
    """
    scale = jnp.exp(trained.log_scale)
    bias = 0.0 if trained.bias is None else trained.bias
    count = len(images.rows) * devices
    selecting = config.negatives in ("hardest", "easiest")
    least = threshold(config, devices, trained, images, texts) if selecting else None

    def formula(pairs: Pairs, _: None, __: None) -> Judged:
        used = pairs.used
        if least is not None:
            used = used & (pairs.positive | (hardness(config, pairs.cosine) >= least))
        logit = scale * pairs.cosine + bias
        wrong = jnp.where(pairs.positive, -logit, logit)
        # softplus(wrong) and its derivative sigmoid(wrong), from one exponential that cannot overflow.
        small = jnp.exp(-jnp.abs(wrong))
        softplus = jnp.maximum(wrong, 0.0) + jnp.log1p(small)
        sigmoid = jnp.where(wrong >= 0, 1.0, small) / (1 + small)
        slope = jnp.where(used, jnp.where(pairs.positive, -sigmoid, sigmoid), 0.0)
        return Judged(jnp.sum(jnp.where(used, softplus, 0.0)), slope, logit, used)

    loss, grads, logits = pair_sums(config, devices, trained, images, texts, formula)
    loss, grads = jax.tree.map(lambda a: a / count, (loss, grads))
    return loss, grads, logits


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
