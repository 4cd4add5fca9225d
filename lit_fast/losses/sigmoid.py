"""The pairwise sigmoid loss: section 3.2 of the SigLIP paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lit_fast.config import LossConfig
from lit_fast.losses.negatives import hardness, threshold
from lit_fast.losses.pairs import Images, Texts, sort_out
from lit_fast.losses.ring import go_round
from lit_fast.losses.statistics import Logits, add_logits, no_logits
from lit_fast.losses.tile import Trained, add, compare, gradients

Sums = tuple[jax.Array, Trained, Logits]


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

    def visit(sums: Sums, block: Images, _: None, real: jax.Array) -> tuple[Sums, None]:
        loss, grads, logits = sums
        tile = compare(config.precision, trained, block.features)
        positive, used = sort_out(config, count, block, texts, real)
        if least is not None:
            used = used & (positive | (hardness(config, tile.cosine) >= least))
        logit = scale * tile.cosine + bias
        label = jnp.where(positive, 1.0, -1.0)
        margin = label * logit
        slope = jnp.where(used, -label * jax.nn.sigmoid(-margin), 0.0)  # d loss / d logit
        return (
            loss + jnp.sum(jnp.where(used, jax.nn.softplus(-margin), 0.0)),
            add(grads, gradients(config.precision, trained, tile, scale, slope)),
            add_logits(logits, logit, positive, used),
        ), None

    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (trained.log_scale, trained))
    (loss, grads, logits), _ = go_round(devices, config.tile, visit, (*zero, no_logits()), images)
    loss, grads = jax.tree.map(lambda a: a / count, (loss, grads))
    return loss, grads, logits
