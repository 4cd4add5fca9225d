"""Read the directory of a trained model that `lit-fast export` writes.

It needs no file outside it.

    DIR/config.json         text tower, loss, rules of the tokenizer
    DIR/model.safetensors   float32 under big_vision's names: txt/... and img/... the towers, t, b, mean, img/head
    DIR/tokenizer.model     sentencepiece
    DIR/tower.json          provenance of the features, from which the vision tower is built
    DIR/receipt.json        of the run, if it had one
    DIR/README.md           model card

The files are not trusted: sizes are compared with the headers of the weights before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
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
from lit_fast.storage.files import is_file, read_object
from lit_fast.storage.hub import Snapshot
from lit_fast.storage.paths import StrPath, join
from lit_fast.towers.tower import Tower, from_provenance
from lit_fast.weights.parameters import nested
from lit_fast.weights.reader import open_safetensors
from lit_fast.weights.resolve import fetch_folder

FORMAT = "lit_fast"
VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
TOWER, RECEIPT = "tower.json", "receipt.json"

# The config keys that define the trained model; the others are about its training.
TEXT_KEYS = (
    "width", "depth", "mlp_dim", "heads", "pooling", "mask_padding", "embedding_width", "head", "dtype",
)  # fmt: skip
LOSS_KEYS = ("name", "bias", "center", "image_head")

# Larger numbers in a config are refused before anything is allocated.
_MAX_SIZE = 1 << 20


class ExportedModel(NamedTuple):
    """The model without the vision tower's weights.

    The fields are those of `lit_fast.inference.model.Model`.
    """

    step: int
    average: bool
    tower_json: dict[str, Any]
    config: TextConfig
    loss: LossConfig
    tokenizer: Tokenizer
    params: Params
    receipt: dict[str, Any] | None


def is_exported(path: StrPath) -> bool:
    """Whether a directory is an exported model rather than a run."""
    return is_file(join(path, CONFIG)) and not is_file(join(path, "config.toml"))


def download_exported(snapshot: Snapshot) -> str:
    """Download an exported model of the Hugging Face Hub; return its directory.

    Raises:
      UserError: the repository is not an exported model, or the download fails.
    """
    return fetch_folder(snapshot, (CONFIG, TOWER, TOKENIZER, WEIGHTS), optional=(RECEIPT,))


def read_exported(path: StrPath) -> ExportedModel:
    """Read the directory except the vision tower's weights, see `read_vision_tower`.

    Raises:
      UserError: it is not an exported model, or it is damaged.
    """
    config_path, tokenizer_path, receipt_path = (join(path, name) for name in (CONFIG, TOKENIZER, RECEIPT))
    if (found := read_object(config_path, "format")["format"]) != FORMAT:
        raise UserError(
            f"{path} is neither a run nor a model that lit-fast export wrote ({CONFIG} has format {str(found)[:40]!r}, "
            f"not {FORMAT!r}); name another directory"
        )
    model = read_object(
        config_path, "version", "step", "average", "text", "loss", "tokenizer",
        version=int, step=int, average=bool, text=dict, loss=dict, tokenizer=dict,
    )  # fmt: skip
    if model["version"] != VERSION:
        raise UserError(f"{config_path} has version {model['version']}; load it with a newer lit_fast")
    config = _config(config_path, model)
    length, pad_id = (_size(config_path, model["tokenizer"], key) for key in ("max_length", "pad_id"))
    tokenizer = load_tokenizer(tokenizer_path, length, pad_id)
    if tokenizer.identity != model["tokenizer"].get("identity"):
        raise UserError(f"{tokenizer_path} is not the tokenizer that the model was trained with; restore it")
    tower = read_tower(path)
    mean = jax.ShapeDtypeStruct((_size(join(path, TOWER), tower, "width", minimum=1),), jnp.float32)
    module = text_tower(config.text, tokenizer, tower["width"])
    shapes = jax.eval_shape(lambda mean: init_params(module, config, mean), mean)
    return ExportedModel(
        step=model["step"],
        average=model["average"],
        tower_json=tower,
        config=config.text,
        loss=config.loss,
        tokenizer=tokenizer,
        params=_read_params(path, shapes, "", lambda name: not _is_vision(name)),
        receipt=read_object(receipt_path) if is_file(receipt_path) else None,
    )


def read_vision_tower(path: StrPath, provenance: dict[str, Any]) -> Tower:
    """Read the vision tower that the directory's `tower.json` describes.

    Raises:
      UserError: `tower.json` is damaged, or the weights are not those of such a tower.
    """
    tower_path = join(path, TOWER)
    try:
        architecture, preprocess = from_provenance(provenance)
        if provenance["dtype"] not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {provenance['dtype']!r}")
        if type(tower_options(provenance).get("max_pixels", 0)) is not int:
            raise TypeError("max_pixels is not a number")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{tower_path} is damaged: {type(error).__name__} {error}; export the model again"
        ) from None
    images = jax.ShapeDtypeStruct((1, preprocess.size, preprocess.size, 3), jnp.float32)
    shapes = jax.eval_shape(ViT(architecture).init, jax.random.key(0), images)["params"]
    tower = Tower(
        name=provenance["name"],
        source=str(path),
        sha256=str(provenance.get("sha256")),
        architecture=architecture,
        preprocess=preprocess,
        params=_read_params(path, shapes, "img/", _is_vision),
        resampled=provenance.get("positions"),
    )
    if tower.provenance(provenance["dtype"])["identity"] != first_view(provenance):
        raise UserError(
            f"{tower_path} is damaged: its identity is that of another tower; export the model again"
        )
    return tower


def _is_vision(name: str) -> bool:
    """Whether a parameter belongs to the vision tower; the image head does not."""
    return name.startswith("img/") and not name.startswith("img/head/")


def _read_params(path: StrPath, shapes: Any, prefix: str, select: Callable[[str], bool]) -> Params:
    """Read the parameters whose names `select` accepts.

    The prefix is removed from their names. Nothing is read unless all have the names and shapes of the tree `shapes`.
    """
    weights = join(path, WEIGHTS)
    expected = {prefix + name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}
    with open_safetensors(weights) as file:
        found = {name: shape for name, shape in file.shapes.items() if select(name)}
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise UserError(
                    f"{weights} does not match the files beside it: {name} is missing; export the model again"
                )
            if found[name] != expected.get(name):
                wanted = expected.get(name, "no such array")
                raise UserError(
                    f"{weights} does not match the files beside it: {name} has shape {found[name]}, expected {wanted}; "
                    "export the model again"
                )
        return nested(((name.removeprefix(prefix), file.take(name)) for name in expected), weights)


def _config(path: str, model: dict[str, Any]) -> Config:
    """Build the config of the text tower and the loss from `config.json`."""
    for section, keys in (("text", TEXT_KEYS), ("loss", LOSS_KEYS)):
        if missing := [
            key for key in keys if key not in model[section]
        ]:  # a default would give another model
            raise UserError(f"{path} is damaged: {section}.{missing[0]} is missing; export the model again")
    for key, value in model["text"].items():
        if type(value) is int:
            _size(path, model["text"], key)
    config = build_config(flatten_toml({"text": model["text"], "loss": model["loss"]}), f"in {path}")
    if config.text.shape.heads < 1 or config.text.shape.width % config.text.shape.heads:
        raise UserError(f"{path} is damaged: {config.text.shape}; export the model again")
    return config


def _size(path: str, values: dict[str, Any], key: str, minimum: int = 0) -> int:
    size = values.get(key)
    if type(size) is not int or not minimum <= size <= _MAX_SIZE:
        raise UserError(f"{path} is damaged: {key} is {str(size)[:40]!r}; export the model again")
    return size
