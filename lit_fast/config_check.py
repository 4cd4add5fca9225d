"""Check a configuration: each value by itself, then keys against each other."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import fields

from lit_fast.config import TRACKERS, Config, ImageConfig, LossConfig, OptimizerConfig, flatten, settings
from lit_fast.errors import UserError
from lit_fast.models.sizes import VARIANTS

_BOUNDS = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def validate(config: Config) -> None:
    """Check every value against its choices and bounds, then the keys that depend on each other.

    Raises:
      UserError: in one line, with the key.
    """
    for key, value in flatten(config).items():
        rules = settings()[key].metadata
        if rules["choices"] and value not in (settings()[key].default, *rules["choices"]):
            raise UserError(f"config key {key} must be one of {', '.join(rules['choices'])}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config key {key} must be a finite number, not {value}")
        if isinstance(value, int | float):
            for kind, bound in rules["bounds"].items():
                words, holds = _BOUNDS[kind]
                if not holds(value, bound):
                    raise UserError(f"config key {key} must be {words} {bound}, not {value}")
    _check_combinations(config)


def _check_combinations(config: Config) -> None:
    text, loss, stream, shape = config.text, config.loss, config.stream, config.text.shape
    if bool(stream.noise) != bool(stream.corrupt_images):
        raise UserError(
            "stream.corrupt_images above 0 and stream.noise need each other; make the noise with lit-fast index "
            "noise:1024 --out N and lit-fast embed N with the tower of the run"
        )
    if stream.neighbours == 1:
        raise UserError("stream.neighbours must be 0, or 2 or more, not 1")
    if stream.neighbours > stream.global_batch:
        raise UserError(
            f"stream.neighbours {stream.neighbours} must be at most stream.global_batch {stream.global_batch}"
        )
    if text.keep == "auto" and text.microbatches > 1:
        raise UserError(
            'text.microbatches is chosen by text.keep = "auto"; leave it out, or set text.keep = "products"'
        )
    if text.pack > 1 and text.dropout and not text.mask_padding:
        raise UserError("text.pack with text.dropout needs text.mask_padding = true")
    for key in ("row_tokens", "rows"):
        if getattr(text, key) and not text.packed:
            raise UserError(f"text.{key} needs text.pack above 1 and text.mask_padding = true")
    if shape.width % shape.heads:
        raise UserError(
            f"text.width {shape.width} is not a multiple of text.heads {shape.heads}; change one of them"
        )
    for key in ("warmup_steps", "cooldown_steps"):
        steps = getattr(config.optimizer, key)
        if steps >= config.steps > 1:
            raise UserError(f"optimizer.{key} {steps} must be below steps {config.steps}")
    _check_image(config)
    _check_optimizer(config.optimizer)
    for name in config.log.trackers:
        if name not in TRACKERS:
            raise UserError(f"log.report_to {name!r} is unknown; use some of {', '.join(TRACKERS)}, or none")
    if 0 < loss.temperature_max < loss.temperature_init:
        raise UserError(
            f"loss.temperature_init {loss.temperature_init} must be at most loss.temperature_max {loss.temperature_max}"
        )
    if loss.bias_init != LossConfig.bias_init and (loss.name == "softmax" or not loss.bias):
        reason = 'loss.name = "softmax"' if loss.name == "softmax" else "loss.bias = false"
        raise UserError(f"loss.bias_init has no effect with {reason}; leave it out")
    if loss.negatives == "all":
        if loss.negatives_per_positive:
            raise UserError(
                'loss.negatives_per_positive needs loss.negatives = "random", "hardest" or "easiest"'
            )
    elif loss.name == "softmax":
        raise UserError(
            f'loss.negatives = "{loss.negatives}" is for the sigmoid loss, not for softmax; leave it out'
        )
    elif not loss.negatives_per_positive:
        raise UserError(
            f'loss.negatives = "{loss.negatives}" needs loss.negatives_per_positive above 0, such as 1.6'
        )


def _check_image(config: Config) -> None:
    image = config.image
    if not image.trained:
        for f in fields(ImageConfig):
            if f.name != "dtype" and getattr(image, f.name) != f.default:  # a dtype changes nothing
                raise UserError(
                    f'image.{f.name} is for image.train = "unlocked" or "scratch"; set image.train or leave it out'
                )
        if config.evaluate.few_shot:
            raise UserError(
                'evaluate.few_shot is for image.train = "unlocked" or "scratch"; a frozen tower has the same figures '
                "at every step: lit-fast eval --few-shot TRAIN TEST"
            )
        return
    if image.arch:
        if image.train != "scratch":
            raise UserError('image.arch is for image.train = "scratch"; name the weights with image.tower')
        if image.tower:
            raise UserError("image.arch and image.tower exclude each other; leave out one")
        variant, _, patch = image.arch.rpartition("/")
        if variant not in VARIANTS or not re.fullmatch("[1-9][0-9]?", patch):
            raise UserError(
                f"image.arch {image.arch!r} is not SIZE/PATCH, such as B/16; sizes are {', '.join(VARIANTS)}"
            )
    if image.keep == "auto" and image.microbatches > 1:
        raise UserError(
            'image.microbatches is chosen by image.keep = "auto"; leave it out, or set image.keep = "products"'
        )
    if config.stream.corrupt_images:
        raise UserError('stream.corrupt_images is for image.train = "frozen"; leave it out')
    if config.stream.neighbours or config.loss.near_duplicates != "negative":
        key = "stream.neighbours" if config.stream.neighbours else "loss.near_duplicates"
        raise UserError(f'{key} is for image.train = "frozen"; leave it out')
    if config.loss.center and not config.text.init:
        raise UserError(
            'loss.center needs stored features; leave it out, or start from a centred run with text.init = "RUN"'
        )
    for pair in config.evaluate.few_shot:
        train, equals, test = pair.partition("=")
        if not (train and equals and test):
            raise UserError(f"evaluate.few_shot {pair!r} is not TRAIN=TEST; name two datasets")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if optimizer.name != "schedule_free":
        return
    name = 'optimizer.name = "schedule_free"'
    if optimizer.schedule != "constant":
        raise UserError(
            f'{name} needs optimizer.schedule = "constant", as its average of the weights replaces the decay'
        )
    if not optimizer.b1:
        raise UserError(f"{name} needs optimizer.b1 above 0, such as 0.9")
    if optimizer.average_decay:
        raise UserError(f"{name} needs optimizer.average_decay = 0, as it averages the weights itself")
    if optimizer.momentum_dtype != "float32":
        raise UserError(
            f'{name} needs optimizer.momentum_dtype = "float32", as it has weights instead of a momentum'
        )
