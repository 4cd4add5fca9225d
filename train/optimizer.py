"""Optimizer and schedule.

Follows big_vision's chain: clip, the core, learning rate, weight decay, schedule. Weight decay comes after
the learning rate and before the schedule, so in the paper's convention it is not scaled by the learning
rate: the paper's Lion with 1e-4 and 1e-7 equals `optax.lion(1e-4, weight_decay=1e-3)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lit_fast.config import OptimizerConfig
from lit_fast.errors import UserError

# Rules that single out parameters by their names, such as `txt/Encoder_0/.*/bias=0.1`.


def names_of(tree: Any) -> list[str]:
    """The leaves' names, the keys of the path joined by slashes."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def as_tree(values: dict[str, Any], tree: Any) -> Any:
    """The tree with each leaf replaced by the value of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[_name(path)], tree)


def scales(key: str, rules: tuple[str, ...], names: list[str], default: float) -> dict[str, float]:
    """The factor of each name: of the first rule whose regex matches all of the name, else the default.

    A rule is `REGEX=FACTOR`, or `REGEX`, which means the factor 1.

    Raises:
      UserError: a rule is malformed or matches no name; `key` is the config key to blame.
    """
    parsed = [_parse(key, rule) for rule in rules]
    for rule, (pattern, _) in zip(rules, parsed, strict=True):
        if not any(pattern.fullmatch(n) for n in names):
            raise UserError(f"{key}: {rule!r} matches no parameter; they are {', '.join(_examples(names))}")
    return {n: next((f for p, f in parsed if p.fullmatch(n)), default) for n in names}


def _parse(key: str, rule: str) -> tuple[re.Pattern[str], float]:
    regex, equals, factor = rule.rpartition("=")
    try:
        return re.compile(regex if equals else rule), float(factor) if equals else 1.0
    except (re.error, ValueError) as error:
        raise UserError(f"{key}: {rule!r} is not of the form REGEX=FACTOR: {error}") from None


def _examples(names: list[str]) -> list[str]:
    return names if len(names) < 8 else [*names[:3], "...", *names[-3:]]


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


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
