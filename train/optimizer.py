"""Build the optimizer: core update, schedule, weight decay, rules on parameter names.

The chain is big_vision's: clip the gradients, core update, learning rate, weight decay, schedule. Weight decay comes
after the learning rate and before the schedule, so in the paper's convention it is not scaled by the learning rate:
the paper's Lion with 1e-4 and 1e-7 equals `optax.lion(1e-4, weight_decay=1e-3)`.

To add an optimizer: add its name to `OptimizerConfig.name` and its core update to `_core_update`.
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

Schedule = Callable[[Any], jax.Array]

# Update of Muon per unit of learning rate, as a root mean square: that of Adam, so that one learning rate serves both
# (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
_MUON_RMS = 0.2


def make_optimizer(config: OptimizerConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """Build the optimizer for a parameter tree.

    Frozen parameters have no state and do not count in the gradient norm.

    Args:
      params: arrays or their shapes.

    Raises:
      UserError: a rule of the config matches no parameter.
    """
    names = parameter_names(params)
    frozen = match_rules("optimizer.freeze", config.freeze, names, 0.0) | {"mean": 1.0}
    rate = match_rules("optimizer.learning_rate_scale", config.learning_rate_scale, names, 1.0)
    decay = match_rules("optimizer.weight_decay_scale", config.weight_decay_scale, names, 0.0)
    weight_decay = config.weight_decay
    if config.decay_convention == "optax":
        weight_decay *= config.learning_rate
    schedule = make_schedule(config, steps)
    update = optax.chain(
        _core_update(config, params),
        _scale_by_name({n: config.learning_rate * r for n, r in rate.items()}),
        _decay_by_name({n: weight_decay * d for n, d in decay.items()}),
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
    )
    if config.name == "schedule_free":
        rate_of_step = lambda step: config.learning_rate * schedule(step)  # noqa: E731
        update = optax.contrib.schedule_free(update, rate_of_step, config.b1)
    clip = _clip(config.clip_norm) if config.clip_norm else optax.identity()
    labels = {n: "freeze" if frozen.get(n) else "train" for n in names}
    return optax.partition(
        {"train": optax.chain(clip, update), "freeze": optax.set_to_zero()},
        lambda tree: tree_by_name(labels, tree),
    )


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Return the schedule: completed updates -> factor in [0, 1] (big_vision, utils.py).

    After the warm-up: cosine or linear to zero, the reciprocal square root, or constant; all times a linear warm-up,
    so that the first update of a warm-up does nothing, and a linear cool-down to zero at the end.
    """
    warmup, cooldown, timescale = config.warmup_steps, config.cooldown_steps, config.timescale

    def schedule(step: Any) -> jax.Array:
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if config.schedule == "cosine":
            factor = 0.5 * (1 + jnp.cos(math.pi * progress))
        elif config.schedule == "linear":
            factor = 1 - progress
        elif config.schedule == "rsqrt":
            factor = jax.lax.rsqrt(1 + jnp.maximum(step - warmup, 0) / timescale)
        else:
            factor = jnp.ones_like(progress)
        if warmup:
            factor *= jnp.minimum(1.0, step / warmup)
        if cooldown:
            factor *= jnp.minimum(1.0, (steps - step) / cooldown)
        return factor

    return schedule


def evaluation_params(opt_state: Any, params: Any) -> Any:
    """Return the parameters to evaluate, save and export.

    For schedule_free the average that `optax.contrib.schedule_free_eval_params` computes; for every other optimizer
    `params` itself. Frozen parameters are returned as they are.
    """
    is_state = lambda x: isinstance(x, optax.contrib.ScheduleFreeState)  # noqa: E731
    for state in jax.tree.leaves(opt_state, is_leaf=is_state):
        if is_state(state):
            return _schedule_free_average(state, params)
    return params


@jax.jit
def _schedule_free_average(state: optax.contrib.ScheduleFreeState, params: Any) -> Any:
    is_frozen = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    average = lambda z, y: (  # noqa: E731
        y if is_frozen(z) else optax.contrib.schedule_free_eval_params(state._replace(z=z), y)
    )
    return jax.tree.map(average, state.z, params, is_leaf=is_frozen)


def _core_update(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    """Return the update before learning rate and weight decay."""
    dtype = jnp.dtype(config.momentum_dtype)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype)
    if config.name in ("adam", "adamw"):
        return optax.scale_by_adam(config.b1, config.b2, mu_dtype=dtype)
    if config.name == "muon":
        return _muon(config, params)
    if config.name == "schedule_free":  # as optax.contrib.schedule_free_adamw: Adam without its momentum
        return optax.scale_by_rms(config.b2, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
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


def _muon(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    """Return Muon for the kernels and Adam for all other parameters.

    This is `optax.contrib.muon` without the learning rate.
    Each layer's kernel is one matrix [inputs, outputs], although layers are stacked in one array and the kernels of
    attention are split into heads.
    """
    dtype = jnp.dtype(config.momentum_dtype)
    shapes = {n: leaf.shape for n, leaf in zip(parameter_names(params), jax.tree.leaves(params), strict=True)}
    axes = {n: matrix_axes(n, len(shape)) for n, shape in shapes.items() if n.rpartition("/")[2] == "kernel"}
    fans = {n: [math.prod(shapes[n][i] for i in group) for group in a] for n, a in axes.items()}
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.b1, mu_dtype=dtype, weight_dimension_numbers=lambda tree: tree_by_name(axes, tree)
        ),
        _scale_by_name({n: _MUON_RMS * math.sqrt(max(fan)) for n, fan in fans.items()}),
    )
    adam = optax.scale_by_adam(config.b1, config.b2, mu_dtype=dtype, nesterov=True)
    labels = {n: "muon" if n in axes else "adam" for n in shapes}
    return optax.partition({"muon": muon, "adam": adam}, lambda tree: tree_by_name(labels, tree))


def matrix_axes(name: str, ndim: int) -> optax.contrib.MuonDimensionNumbers:
    """Return the input and the output axes of a kernel; a remaining first axis is layers.

    Kernels are [inputs, outputs]; of attention [inputs, heads, width] or, after it, [heads, width, outputs]; of the
    patch embedding [height, width, channels, outputs].
    """
    parts = name.split("/")
    if parts[-2:] == ["embedding", "kernel"]:
        return optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    first = 1 if "encoderblock" in parts else 0
    split = ndim - 1 if "out" in parts else first + 1
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, ndim)))


def _clip(norm: float) -> optax.GradientTransformation:
    """Clip by the global norm, as `optax.clip_by_global_norm`.

    One factor for all: with the division and the choice of optax, XLA on CPUs writes the clipped gradients to memory.
    """

    def update(updates: Any, _: Any) -> Any:
        factor = norm / jnp.maximum(optax.global_norm(updates), norm)
        return jax.tree.map(lambda u: u * factor, updates)

    return optax.stateless(update)


def _scale_by_name(factors: dict[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, _: Any) -> Any:
        return jax.tree.map(jnp.multiply, updates, tree_by_name(factors, updates))

    return optax.stateless(update)


def _decay_by_name(factors: dict[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, p, f: u + f * p if f else u, updates, params, tree_by_name(factors, updates)
        )

    return optax.stateless(update)


# Rules on parameter names, such as `txt/Encoder_0/.*/bias=0.1`.


def parameter_names(tree: Any) -> list[str]:
    """Return the names of the leaves: the keys of their paths, joined by slashes."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def tree_by_name(values: dict[str, Any], tree: Any) -> Any:
    """Return the tree with each leaf replaced by the value of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[_name(path)], tree)


def match_rules(key: str, rules: tuple[str, ...], names: list[str], default: float) -> dict[str, float]:
    """Return the factor of each name: that of the first matching rule, or the default.

    A rule matches whole names. It is `REGEX=FACTOR`, or `REGEX`, which means the factor 1.

    Args:
      key: config key of the rules, for the error message.

    Raises:
      UserError: a rule is malformed or matches no name.
    """
    parsed = [_parse_rule(key, rule) for rule in rules]
    for rule, (pattern, _) in zip(rules, parsed, strict=True):
        if not any(pattern.fullmatch(n) for n in names):
            examples = names if len(names) < 8 else [*names[:3], "...", *names[-3:]]
            raise UserError(
                f"{key}: {rule!r} matches no parameter; use one of the names {', '.join(examples)}"
            )
    return {n: next((f for p, f in parsed if p.fullmatch(n)), default) for n in names}


def _parse_rule(key: str, rule: str) -> tuple[re.Pattern[str], float]:
    regex, equals, factor = rule.rpartition("=")
    try:
        return re.compile(regex if equals else rule), float(factor) if equals else 1.0
    except (re.error, ValueError) as error:
        raise UserError(
            f"{key}: {rule!r} is not of the form REGEX=FACTOR ({error}); write for example img/.*=0.1"
        ) from None


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)
