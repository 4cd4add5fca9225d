"""Export as the directory that `lit_fast.load` reads.

`lit_fast.inference.load` describes its files.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from lit_fast.inference.load import (
    CONFIG,
    FORMAT,
    LOSS_KEYS,
    RECEIPT,
    TEXT_KEYS,
    TOKENIZER,
    TOWER,
    VERSION,
    WEIGHTS,
)
from lit_fast.inference.model import Model
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.paths import join, name
from lit_fast.storage.text_files import write_json
from lit_fast.train.export.card import write_card
from lit_fast.train.export.writer import ExportOptions
from lit_fast.weights.to_torch import contiguous


def check(model: Model, options: ExportOptions) -> None:
    """Raise UserError if the vision tower's weights cannot be loaded."""
    _ = model.tower


def write(model: Model, directory: str, options: ExportOptions) -> None:
    """Write the files of `lit_fast.inference.load`."""
    arrays = flatten_dict(model.params, sep="/") | flatten_dict({"img": model.tower.stored_params}, sep="/")
    save_file(contiguous(arrays), join(directory, WEIGHTS), {"format": FORMAT})
    write_atomic(join(directory, TOKENIZER), model.tokenizer.model)
    write_json(join(directory, CONFIG), _config(model))
    write_json(join(directory, TOWER), _file_names_only(model.tower_json))
    if model.receipt is not None:
        write_json(join(directory, RECEIPT), _file_names_only(model.receipt))
    write_card(directory, model, "lit_fast")


def _config(model: Model) -> dict[str, Any]:
    text = asdict(model.config) | model.config.shape._asdict()
    loss = asdict(model.loss)
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": model.step,
        "average": model.average,
        "text": {key: text[key] for key in TEXT_KEYS},
        "loss": {key: loss[key] for key in LOSS_KEYS},
        "tokenizer": {
            "max_length": model.tokenizer.max_length,
            "pad_id": model.tokenizer.pad_id,
            "identity": model.tokenizer.identity,
        },
    }


def _file_names_only(value: Any) -> Any:
    """Replace every absolute path in a JSON value by its last part.

    The export should not show the directories of this machine.
    """
    if isinstance(value, dict):
        return {key: _file_names_only(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_file_names_only(item) for item in value]
    return name(value) if isinstance(value, str) and value.startswith("/") else value
