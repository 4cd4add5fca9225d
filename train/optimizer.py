"""Optimizer and schedule.

Follows big_vision's chain: clip, the core, learning rate, weight decay, schedule. Weight decay comes after
the learning rate and before the schedule, so in the paper's convention it is not scaled by the learning
rate: the paper's Lion with 1e-4 and 1e-7 equals `optax.lion(1e-4, weight_decay=1e-3)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lit_fast.config import OptimizerConfig
from train.rules import as_tree, names_of, scales

Schedule = Callable[[Any], jax.Array]


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Factor in [0, 1] for the update after a number of completed ones (big_vision, utils.py).

    Cosine or linear to zero after the warm-up, or the reciprocal square root, which ends in a linear
    cool-down; all times a linear warm-up, so that the first update of a warm-up does nothing.
    """
    warmup, cooldown, timescale = config.warmup_steps, config.cooldown_steps, config.timescale

    def schedule(step: Any) -> jax.Array:
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if config.schedule == "cosine":
            factor = 0.5 * (1 + jnp.cos(math.pi * progress))
        elif config.schedule == "linear":
            factor = 1 - progress
        else:
            factor = jax.lax.rsqrt(1 + jnp.maximum(step - warmup, 0) / timescale)
        if warmup:
            factor *= jnp.minimum(1.0, step / warmup)
        if cooldown:
            factor *= jnp.minimum(1.0, (steps - step) / cooldown)
        return factor

    return schedule


def make_optimizer(config: OptimizerConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """The chain for parameters of this structure; frozen ones have no state and do not count in the norm.

    Raises:
      UserError: a rule matches no parameter.
    """
    names = names_of(params)
    frozen = scales("optimizer.freeze", config.freeze, names, 0.0) | {"mean": 1.0}
    rate = scales("optimizer.learning_rate_scale", config.learning_rate_scale, names, 1.0)
    decay = scales("optimizer.weight_decay_scale", config.weight_decay_scale, names, 0.0)
    weight_decay = config.weight_decay
    if config.weight_decay_convention == "optax":
        weight_decay *= config.learning_rate
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _core(config),
        _scaled({n: config.learning_rate * r for n, r in rate.items()}),
        _decayed({n: weight_decay * d for n, d in decay.items()}),
        optax.scale_by_schedule(make_schedule(config, steps)),
        optax.scale(-1.0),
    )
    labels = {n: "freeze" if frozen.get(n) else "train" for n in names}
    return optax.multi_transform(
        {"train": chain, "freeze": optax.set_to_zero()}, lambda p: as_tree(labels, p)
    )


def _core(config: OptimizerConfig) -> optax.GradientTransformation:
    dtype = jnp.dtype(config.momentum_dtype)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype)
    if config.name == "adam":
        return optax.scale_by_adam(config.b1, config.b2, mu_dtype=dtype)
    # "Scaling Vision Transformers", appendix: Adafactor without relative step and parameter scale, factored
    # from 32 on, its second-moment decay capped by b2, with momentum that is not debiased.
    return optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            decay_rate=0.8,
            decay_rate_fn=lambda i, power: jnp.minimum(config.b2, 1.0 - (i + 1.0) ** -power),
        ),
        optax.ema(config.b1, debias=False, accumulator_dtype=dtype),
    )


def _scaled(factors: dict[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, _: Any) -> Any:
        return jax.tree.map(jnp.multiply, updates, as_tree(factors, updates))

    return optax.stateless(update)


def _decayed(factors: dict[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, f: u + f * p if f else u, updates, params, as_tree(factors, updates))

    return optax.stateless(update)
