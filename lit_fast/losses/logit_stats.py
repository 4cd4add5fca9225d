"""How the logits of positive and negative pairs are distributed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Logits(NamedTuple):
    """Of the pairs seen so far, each float32 []; only those that count in the loss."""

    positives: jax.Array
    negatives: jax.Array
    positive_sum: jax.Array
    negative_sum: jax.Array
    # Smallest ones with the sign turned, so that one maximum over the devices serves all four.
    positive_max: jax.Array
    negative_max: jax.Array
    minus_positive_min: jax.Array
    minus_negative_min: jax.Array


def no_logits() -> Logits:
    """Before the first pair."""
    return Logits(*[jnp.zeros(())] * 4, *[jnp.full((), -jnp.inf)] * 4)


def add_logits(seen: Logits, logit: jax.Array, positive: jax.Array, used: jax.Array) -> Logits:
    """With the pairs of one tile: logits float32 [tile, m], bool broadcastable to that."""
    p, q = positive & used, used & ~positive

    def most(x: jax.Array, kind: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(kind, x, -jnp.inf))

    return Logits(
        seen.positives + jnp.sum(p, dtype=jnp.int32),
        seen.negatives + jnp.sum(q, dtype=jnp.int32),
        seen.positive_sum + jnp.sum(jnp.where(p, logit, 0.0)),
        seen.negative_sum + jnp.sum(jnp.where(q, logit, 0.0)),
        jnp.maximum(seen.positive_max, most(logit, p)),
        jnp.maximum(seen.negative_max, most(logit, q)),
        jnp.maximum(seen.minus_positive_min, most(-logit, p)),
        jnp.maximum(seen.minus_negative_min, most(-logit, q)),
    )


def logit_metrics(sums: tuple[jax.Array, ...], bounds: jax.Array) -> dict[str, jax.Array]:
    """Named figures, float32 [], of the whole batch.

    Args:
      sums: the first four fields of `Logits`, summed over the devices.
      bounds: float32 [4], the last four, the largest of any device.

    Where there is no pair of a kind the mean is NaN and the bounds are infinite.
    """
    positives, negatives, positive_sum, negative_sum = sums
    positive_max, negative_max, minus_positive_min, minus_negative_min = bounds
    return {
        "positive_logit_mean": positive_sum / positives,
        "positive_logit_min": -minus_positive_min,
        "positive_logit_max": positive_max,
        "negative_logit_mean": negative_sum / negatives,
        "negative_logit_min": -minus_negative_min,
        "negative_logit_max": negative_max,
    }
