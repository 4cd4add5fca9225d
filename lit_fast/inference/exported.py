"""The folder of a trained model, as `lit-fast export` writes it: everything in it, nothing outside of it needed.

    DIR/config.json         text tower, loss, rules of the tokenizer
    DIR/model.safetensors   float32 under big_vision's names: txt/... and img/... the towers, t, b, mean, img/head
    DIR/tokenizer.model     sentencepiece
    DIR/tower.json          provenance of the features, from which the vision tower is built again
    DIR/receipt.json        of the run, if it had one
    DIR/README.md           model card

Nothing in it is trusted: sizes are compared with the headers of the weights before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from lit_fast.config import Config, LossConfig, TextConfig
from lit_fast.config_io import build_config, flatten_toml
from lit_fast.data.features import first_view, tower_options
from lit_fast.data.tokenizer import Tokenizer, load_tokenizer
from lit_fast.errors import UserError
from lit_fast.models.two_towers import Params, init_params, text_tower
from lit_fast.models.vit import ViT
from lit_fast.runs.run import read_tower
from lit_fast.storage.files import read_object
from lit_fast.towers.tower import Tower, from_provenance
from lit_fast.weights.parameters import nested
from lit_fast.weights.reader import open_safetensors

FORMAT = "lit_fast"
VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
TOWER, RECEIPT, CARD = "tower.json", "receipt.json", "README.md"

# What a run's config says of the trained model; the other keys are about its training.
TEXT_KEYS = (
    "width",
    "depth",
    "mlp_dim",
    "heads",
    "pooling",
    "mask_padding",
    "embedding_width",
    "head",
    "dtype",
)
LOSS_KEYS = ("name", "bias", "center", "image_head")

# Larger numbers in a config are refused before anything is made of them.
_LARGEST = 1 << 20


class Exported(NamedTuple):
    """What the folder holds but the vision tower's weights; fields as of lit_fast.inference.model.Model."""

    step: int
    average: bool
    tower_json: dict[str, Any]
    config: TextConfig
    loss: LossConfig
    tokenizer: Tokenizer
    params: Params
    receipt: dict[str, Any] | None


def is_exported(path: Path) -> bool:
    """Whether a directory is to be read as an exported model rather than as a run."""
    return (path / CONFIG).is_file() and not (path / "config.toml").is_file()


def is_vision(name: str) -> bool:
    """Whether a parameter is one of the vision tower; the image head is not."""
    return name.startswith("img/") and not name.startswith("img/head/")


def read_exported(path: Path) -> Exported:
    """Read the folder, but for the vision tower's weights, see `read_vision_tower`.

    Raises:
      UserError: it is something else or damaged.
    """
    told = read_object(path / CONFIG, "format")
    if told["format"] != FORMAT:
        raise UserError(
            f"{path} holds neither a run nor a model that lit-fast export wrote ({CONFIG} has no format {FORMAT!r})"
        )
    told = read_object(
        path / CONFIG, "version", "step", "average", "text", "loss", "tokenizer",
        version=int, step=int, average=bool, text=dict, loss=dict, tokenizer=dict,
    )  # fmt: skip
    if told["version"] != VERSION:
        raise UserError(f"{path / CONFIG} is of version {told['version']}, which this lit_fast cannot read")
    config = _config(path / CONFIG, told)
    length, padding = (_size(path / CONFIG, told["tokenizer"], key) for key in ("max_length", "pad_id"))
    tokenizer = load_tokenizer(path / TOKENIZER, length, padding)
    if tokenizer.identity != told["tokenizer"].get("identity"):
        raise UserError(
            f"{path / TOKENIZER} is not the tokenizer that the model was trained with; restore it"
        )
    tower = read_tower(path)
    mean = jax.ShapeDtypeStruct((_size(path / TOWER, tower, "width", least=1),), jnp.float32)
    module = text_tower(config.text, tokenizer, tower["width"])
    want = jax.eval_shape(lambda mean: init_params(module, config, mean), mean)
    params = _weights(path / WEIGHTS, want, "", lambda name: not is_vision(name))
    receipt = path / RECEIPT
    return Exported(
        step=told["step"],
        average=told["average"],
        tower_json=tower,
        config=config.text,
        loss=config.loss,
        tokenizer=tokenizer,
        params=params,
        receipt=read_object(receipt) if receipt.is_file() else None,
    )


def read_vision_tower(path: Path, told: dict[str, Any]) -> Tower:
    """The vision tower of the folder, as its `tower.json` describes it.

    Raises:
      UserError: the description is damaged, or the weights are not those of such a tower.
    """
    try:
        architecture, preprocess = from_provenance(told)
        if told["dtype"] not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {told['dtype']!r}")
        if type(tower_options(told).get("max_pixels", 0)) is not int:
            raise TypeError("max_pixels is not a number")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / TOWER} is damaged: {type(error).__name__} {error}") from None
    images = jax.ShapeDtypeStruct((1, preprocess.size, preprocess.size, 3), jnp.float32)
    want = jax.eval_shape(ViT(architecture).init, jax.random.key(0), images)["params"]
    tower = Tower(
        name=told["name"],
        source=str(path),
        sha256=str(told.get("sha256")),
        architecture=architecture,
        preprocess=preprocess,
        params=_weights(path / WEIGHTS, want, "img/", is_vision),
        resampled=told.get("positions"),
    )
    if tower.provenance(told["dtype"])["identity"] != first_view(told):
        raise UserError(f"{path / TOWER} is damaged: it describes another tower than its identity is of")
    return tower


def _weights(path: Path, want: Any, prefix: str, mine: Callable[[str], bool]) -> Params:
    """The arrays that are `mine`, nested; nothing is read unless all have the names and shapes of `want`."""
    expected = {prefix + name: leaf.shape for name, leaf in flatten_dict(want, sep="/").items()}
    with open_safetensors(path) as file:
        found = {name: shape for name, shape in file.shapes.items() if mine(name)}
        for name in sorted(expected.keys() | found.keys()):
            have, wanted = found.get(name), expected.get(name)
            if have != wanted:
                what = (
                    "is missing"
                    if have is None
                    else f"has shape {have}, expected {wanted or 'no such array'}"
                )
                raise UserError(f"{path} does not belong to the files beside it: {name} {what}")
        return nested(((name.removeprefix(prefix), file.take(name)) for name in expected), path)


def _config(where: Path, told: dict[str, Any]) -> Config:
    """What a run's config would say of the text tower and the loss."""
    for part, keys in (("text", TEXT_KEYS), ("loss", LOSS_KEYS)):
        if missing := [key for key in keys if key not in told[part]]:  # a default would be another model
            raise UserError(f"{where} is damaged: {part}.{missing[0]} is missing")
    for key, value in told["text"].items():
        if type(value) is int:
            _size(where, told["text"], key)
    config = build_config(flatten_toml({"text": told["text"], "loss": told["loss"]}), f"in {where}")
    if config.text.shape.heads < 1 or config.text.shape.width % config.text.shape.heads:
        raise UserError(f"{where} is damaged: {config.text.shape}")
    return config


def _size(where: Path, value: dict[str, Any], key: str, least: int = 0) -> int:
    size = value.get(key)
    if type(size) is not int or not least <= size <= _LARGEST:
        raise UserError(f"{where} is damaged: {key} is {str(size)[:40]!r}")
    return size
