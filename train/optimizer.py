"""Optimizer and schedule.

Follows big_vision's chain: clip, the core, learning rate, weight decay, schedule. Weight decay comes after
the learning rate and before the schedule, so in the paper's convention it is not scaled by the learning
rate: the paper's Lion with 1e-4 and 1e-7 equals `optax.lion(1e-4, weight_decay=1e-3)`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lit_fast.config import OptimizerConfig


def schedule(step: jax.Array | float, warmup: int, steps: int) -> jax.Array:
    """Factor in [0, 1] for the update after `step` completed ones: linear warm-up times cosine to zero."""
    progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
    return (
        0.5 * (1 + jnp.cos(math.pi * progress)) * jnp.minimum(1.0, step / max(warmup, 1) if warmup else 1.0)
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The chain; parameters under "mean" are frozen and have no state."""
    if config.name == "lion":
        core = optax.scale_by_lion(config.b1, config.b2, mu_dtype=jnp.dtype(config.momentum_dtype))
    else:
        core = optax.scale_by_adam(config.b1, config.b2, mu_dtype=jnp.dtype(config.momentum_dtype))
    decay = config.weight_decay
    if config.weight_decay_convention == "optax":
        decay *= config.learning_rate
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        core,
        optax.scale(config.learning_rate),
        optax.add_decayed_weights(decay, mask=_kernels),
        optax.scale_by_schedule(lambda step: schedule(step, config.warmup_steps, steps)),
        optax.scale(-1.0),
    )
    return optax.multi_transform({"train": chain, "freeze": optax.set_to_zero()}, _labels)


def _kernels(params: Any) -> Any:
    """True for kernels only: no decay of embeddings, positions, norms, biases, temperature."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path[-1]) == "kernel", params)


def _labels(params: Any) -> Any:
    label = lambda path, _: "freeze" if _name(path[0]) == "mean" else "train"  # noqa: E731
    return jax.tree_util.tree_map_with_path(label, params)


def _name(key: Any) -> str:
    return str(getattr(key, "key", key))
