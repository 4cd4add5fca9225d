"""The pairwise sigmoid loss: section 3.2 of the SigLIP paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.negatives import hardness, threshold
from lit_fast.losses.pairs import Images, Texts
from lit_fast.losses.sums import Judged, Pairs, Sums, pair_sums
from lit_fast.losses.tile import Trained


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
