"""Which values of a configuration make sense, and which only together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lit_fast.errors import UserError
from lit_fast.variants import VARIANTS

if TYPE_CHECKING:  # it asks for these checks itself
    from lit_fast.config import Config, LossConfig

_CHOICES = {
    "text.variant": tuple(VARIANTS),
    "text.keep": ("auto", "everything", "products", "hidden", "inputs", "embeddings"),
    "text.pooling": ("last", "first", "mean", "max", "map"),
    "text.dtype": ("float32", "bfloat16"),
    "loss.name": ("sigmoid", "softmax"),
    "loss.same_image": ("positive", "mask"),
    "loss.same_caption": ("negative", "mask"),
    "loss.negatives": ("all", "random", "hardest", "easiest"),
    "loss.precision": ("default", "high", "highest"),
    "optimizer.name": ("lion", "adam", "adafactor"),
    "optimizer.schedule": ("cosine", "linear", "rsqrt"),
    "optimizer.momentum_dtype": ("float32", "bfloat16"),
    "optimizer.weight_decay_convention": ("paper", "optax"),
}
_AT_LEAST_ONE = (
    "steps", "text.parts", "text.pack", "loss.tile", "stream.global_batch", "stream.captions_per_image",
    "stream.streams", "stream.window_blocks", "optimizer.timescale", "checkpoint.every_steps", "checkpoint.keep",
    "log.every_steps", "plan.vocab_size",
)  # fmt: skip


def check_values(config: Config, values: dict[str, Any]) -> None:
    """Refuse what makes no sense; `values` are those of `config` by dotted name.

    Raises:
      UserError: in one line, with the key.
    """
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"config key {key} must be one of {', '.join(choices)}, not {values[key]!r}")
    for key in _AT_LEAST_ONE:
        if values[key] < 1:
            raise UserError(f"config key {key} must be at least 1, not {values[key]}")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config key {key} must be a finite number, not {value}")
        if isinstance(value, int | float) and value < 0 and key != "loss.bias_init":
            raise UserError(f"config key {key} must not be negative, not {value}")
    for key, bound in {"steps": 2**31, "seed": 2**32 - 1, "stream.global_batch": 2**31}.items():
        if values[key] >= bound:
            raise UserError(f"config key {key} must be below {bound}, not {values[key]}")
    if values["plan.max_length"] < 2:
        raise UserError(f"config key plan.max_length must be at least 2, not {values['plan.max_length']}")
    for key in ("text.dropout", "optimizer.b1", "optimizer.b2", "optimizer.average_decay"):
        if values[key] >= 1:
            raise UserError(f"config key {key} must be below 1, not {values[key]}")
    for key in ("stream.corrupt_images", "stream.corrupt_texts", "stream.corrupt_alignment"):
        if values[key] > 1:
            raise UserError(f"config key {key} must be at most 1, not {values[key]}")
    if bool(config.stream.noise) != bool(config.stream.corrupt_images):
        raise UserError(
            "stream.corrupt_images above 0 and stream.noise go together: the noise is a dataset made with lit-fast "
            "index noise:1024 --out N, then lit-fast embed N with the tower of the run"
        )
    _check_loss(config.loss)
    shape = config.text.shape
    if config.text.keep == "auto" and config.text.parts > 1:
        raise UserError(
            'text.parts is chosen by text.keep = "auto"; leave it out, or say what is kept: text.keep = "products"'
        )
    if config.text.pack > 1 and config.text.dropout and not config.text.mask_padding:
        raise UserError("text.pack with text.dropout needs text.mask_padding = true")
    if config.text.row_tokens and not config.text.packed:
        raise UserError("text.row_tokens needs text.pack above 1 and text.mask_padding = true")
    if shape.width % shape.heads:
        raise UserError(f"text.width {shape.width} is not a multiple of text.heads {shape.heads}")
    for key in ("warmup_steps", "cooldown_steps"):
        if getattr(config.optimizer, key) >= config.steps > 1:
            raise UserError(
                f"optimizer.{key} {getattr(config.optimizer, key)} must be below steps {config.steps}"
            )


def _check_loss(loss: LossConfig) -> None:
    if loss.temperature_init <= 0:
        raise UserError("config key loss.temperature_init must be positive")
    if 0 < loss.temperature_max < loss.temperature_init:
        raise UserError(
            f"loss.temperature_init {loss.temperature_init} is above loss.temperature_max {loss.temperature_max}"
        )
    if loss.bias_init != type(loss).bias_init and (loss.name == "softmax" or not loss.bias):
        reason = 'loss.name = "softmax"' if loss.name == "softmax" else "loss.bias = false"
        raise UserError(f"with {reason} there is no bias; leave out loss.bias_init")
    if loss.negatives == "all":
        if loss.negatives_per_positive:
            raise UserError(
                'loss.negatives_per_positive needs loss.negatives = "random", "hardest" or "easiest"'
            )
    elif loss.name == "softmax":
        raise UserError(f'loss.negatives = "{loss.negatives}" is for the sigmoid loss, not for softmax')
    elif not loss.negatives_per_positive:
        raise UserError(
            f'loss.negatives = "{loss.negatives}" needs loss.negatives_per_positive above 0, such as 1.6'
        )
