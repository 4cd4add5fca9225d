"""Export as big_vision's `.npz` of two towers.

Names are those of big_vision's models/proj/image_text/two_towers.py.

    model.npz        params/img/..., params/txt/..., params/t and, with the sigmoid loss, params/b, float32
    tokenizer.model  sentencepiece
    README.md        model card, with the configuration that loads it

Blocks are stored one by one, as big_vision's text tower reads them. Subtracting the mean feature and the image head
become the image tower's own `head`: (f - mean) W = f W - mean W, and the scale of f is lost in normalizing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.errors import UserError
from lit_fast.inference.model import Model
from lit_fast.models.text_tower import EPSILON
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.paths import join
from lit_fast.train.export.card import rounding_note, write_card
from lit_fast.train.export.fold import image_head, with_token_table
from lit_fast.train.export.vision_tower import own_vit
from lit_fast.train.export.writer import ExportOptions


def check(model: Model, options: ExportOptions) -> None:
    """Raise UserError if big_vision lacks a part of either tower."""
    a = own_vit(model).architecture
    reasons = {  # on the kind of GELU see `_notes`
        "its text tower attends to padding (text.mask_padding = true)": model.config.mask_padding,
        f"its image tower has no {a.gelu} activation": a.gelu not in ("tanh", "exact"),
        "its image tower has no register tokens": a.registers > 0,
        "its image tower has no LayerNorm before the first block": a.pre_norm,
        "its image tower has no LayerNorm after pooling": a.norm_after_pool,
        f"its image tower has no pooling {a.pool!r} beside a class token": a.class_token and a.pool != "tok",
        f"the epsilon of its LayerNorm is {EPSILON}, not {a.epsilon}": a.epsilon != EPSILON,
    }
    if missing := [reason for reason, applies in reasons.items() if applies]:
        raise UserError(
            f"big_vision cannot express this model: {'; '.join(missing)}; export with --format lit_fast or onnx"
        )


def write(model: Model, directory: str, options: ExportOptions) -> None:
    """Write the weights, the tokenizer and the card."""
    np.savez(join(directory, "model.npz"), allow_pickle=False, **arrays(model))
    write_atomic(join(directory, "tokenizer.model"), model.tokenizer.model)
    write_card(directory, model, "big_vision", _notes(model), **_towers(model))


def arrays(model: Model) -> dict[str, np.ndarray]:
    """Return all parameters, float32, by their names in big_vision."""
    image = own_vit(model).params
    if _has_image_head(model):
        kernel = image_head(model)
        image = image | {"head": {"kernel": kernel, "bias": -model.params["mean"] @ kernel}}
    tree = {"img": image, "txt": with_token_table(model.params["txt"])}
    tree |= {name: model.params[name] for name in ("t", "b") if name in model.params}
    named: dict[str, np.ndarray] = {}
    for name, array in flatten_dict({"params": tree}, sep="/").items():
        prefix, stacked, suffix = name.partition("/encoderblock/")
        if stacked:
            named |= {f"{prefix}/encoderblock_{i}/{suffix}": layer for i, layer in enumerate(array)}
        else:
            named[name] = array
    return named


def _has_image_head(model: Model) -> bool:
    """Return whether big_vision's image tower needs its own `head`."""
    return "img" in model.params or bool(model.params["mean"].any())


def _notes(model: Model) -> list[str]:
    """List the differences between the export and the model."""
    notes = [rounding_note(model)]
    if own_vit(model).architecture.gelu == "exact":
        notes.append(
            "big_vision computes GELU by its tanh approximation, these features were made with the exact one (they "
            "differ by less than 5e-4 per activation): features and scores differ slightly"
        )
    if model.config.embedding_width:
        notes.append(
            "the token table and its projection are multiplied out, which is exact up to float32 rounding"
        )
    return notes


def _towers(model: Model) -> dict[str, Any]:
    """Return big_vision's configuration of the two towers, as Python source."""
    a, text = own_vit(model).architecture, model.config
    configs = {
        "image": a.shape._asdict() | {"patch_size": (a.patch, a.patch), "pool_type": a.pool},
        "text": text.shape._asdict() | {"vocab_size": model.tokenizer.vocab_size, "pool_type": text.pooling},
    }
    for config in configs.values():
        config["num_heads"] = config.pop("heads")
    source = {
        tower: f"dict({', '.join(f'{k}={v!r}' for k, v in config.items())})"
        for tower, config in configs.items()
    }
    widths = (model.width if _has_image_head(model) else None, model.width if text.head else None)
    return source | {"out_dim": widths}
