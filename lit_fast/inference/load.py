"""Load a trained model from a run, an exported directory, or the Hugging Face Hub.

`lit-fast export` writes the directory of a model. It refers to no other file.

    DIR/config.json         text tower, loss, rules of the tokenizer
    DIR/model.safetensors   float32 under big_vision's names: txt/... and img/... the towers, t, b, mean, img/head
    DIR/tokenizer.model     sentencepiece
    DIR/tower.json          provenance of the features, from which the vision tower is built
    DIR/receipt.json        of the run, if it had one
    DIR/README.md           model card

The files are not trusted: sizes are compared with the headers of the weights before anything is allocated.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.config import Config
from lit_fast.config_io import build_config, flatten_toml
from lit_fast.data.features import first_view, tower_options
from lit_fast.data.tokenizer import load_tokenizer
from lit_fast.errors import UserError
from lit_fast.inference.model import Model
from lit_fast.models.two_towers import Params, init_params, text_tower, without_image_tower
from lit_fast.models.vit import ViT
from lit_fast.runs.run import open_run, read_tower
from lit_fast.storage.files import exists, is_file
from lit_fast.storage.paths import StrPath, absolute, join
from lit_fast.storage.paths import name as last_part
from lit_fast.storage.text_files import read_object
from lit_fast.towers.embed import open_tower
from lit_fast.towers.interface import FrozenTower
from lit_fast.towers.torch.load import LIBRARIES, torch_tower_from_provenance
from lit_fast.towers.tower import Tower, from_provenance, trained_tower
from lit_fast.weights.parameters import nested
from lit_fast.weights.reader import open_safetensors
from lit_fast.weights.resolve import fetch_folder, find_repository

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


def load(path: StrPath, *, step: int | None = None, average: bool = False, tower: str | None = None) -> Model:
    """Load a model from a run, an exported directory, or the Hugging Face Hub.

    Args:
      path: the directory, or hf:OWNER/NAME[@REVISION], which is downloaded on first use.
      step: of the run's checkpoint; by default the last.
      average: load the average of the run's weights, if one was kept.
      tower: file or name of the vision tower's weights, if they have moved since the features were computed.

    Raises:
      UserError: the directory is not a model or damaged, or has no such checkpoint or average.
    """
    path = os.fspath(path)
    name = last_part(absolute(path))
    if not exists(path) and (snapshot := find_repository(path)):
        try:
            path = fetch_folder(snapshot, (CONFIG, TOWER, TOKENIZER, WEIGHTS), optional=(RECEIPT,))
        except UserError as error:
            raise UserError(f"{path} is not a directory here, and as a repository {error}") from None
        name = snapshot.repository
    if is_file(join(path, "config.toml")) or not is_file(join(path, CONFIG)):
        return _load_run(path, step, average, tower)
    for option, is_set in (("step", step is not None), ("average", average), ("tower", tower is not None)):
        if is_set:
            raise UserError(f"{path} is an exported model, which has one set of weights; leave out {option}")
    return _load_exported(path, name)


def _load_run(path: str, step: int | None, average: bool, weights: str | None) -> Model:
    run = open_run(path, step, average)
    provenance, open_tower = run.tower_json, lambda: _open_tower_of_run(path, run.tower_json, weights)
    if run.config.image.trained:
        if weights:
            raise UserError(f"run {path} trained its own image tower; leave out tower")
        tower = trained_tower(run)
        provenance, open_tower = tower.provenance(run.config.image.dtype), lambda: tower
    return Model(
        name=run.name,
        step=run.step,
        average=average,
        tower_json=provenance,
        config=run.config.text,
        loss=run.config.loss,
        tokenizer=run.tokenizer,
        params=jax.tree.map(np.asarray, without_image_tower(run.params)),
        receipt=_read_receipt(path),
        open_tower=open_tower,
    )


def _open_tower_of_run(path: str, provenance: dict[str, Any], weights: str | None) -> FrozenTower:
    """Open the tower of a run's `tower.json`, from its source or from other weights."""
    if "architecture" not in provenance:
        raise UserError(
            f"the features that {path} was trained with were not made by lit-fast embed, so images cannot be embedded; "
            "use the model for texts only"
        )
    source = weights or provenance["source"]
    try:
        tower = open_tower(source, tower_options(provenance))
    except UserError as error:
        hint = "" if weights else "; if the vision tower's weights have moved, name them with --tower"
        raise UserError(f"{error}{hint}") from None
    if not _is_trained_tower(tower, provenance):
        raise UserError(
            f"{source} is not the vision tower that {path} was trained with ({provenance['name']}, sha256 "
            f"{str(provenance.get('sha256', 'unknown'))[:12]}); name the right weights with --tower"
        )
    return tower


def _load_exported(path: str, name: str) -> Model:
    config_path, tokenizer_path = join(path, CONFIG), join(path, TOKENIZER)
    if (found := read_object(config_path, "format")["format"]) != FORMAT:
        raise UserError(
            f"{path} is neither a run nor a model that lit-fast export wrote ({CONFIG} has format {str(found)[:40]!r}, "
            f"not {FORMAT!r}); name another directory"
        )
    values = read_object(
        config_path, "version", "step", "average", "text", "loss", "tokenizer",
        version=int, step=int, average=bool, text=dict, loss=dict, tokenizer=dict,
    )  # fmt: skip
    if values["version"] != VERSION:
        raise UserError(
            f"{config_path} has version {values['version']}, this version reads {VERSION}; update lit-fast"
        )
    config = _read_config(config_path, values)
    length, pad_id = (_read_size(config_path, values["tokenizer"], key) for key in ("max_length", "pad_id"))
    tokenizer = load_tokenizer(tokenizer_path, length, pad_id)
    if tokenizer.identity != values["tokenizer"].get("identity"):
        raise UserError(f"{tokenizer_path} is not the tokenizer that the model was trained with; restore it")
    provenance = read_tower(path)
    width = _read_size(join(path, TOWER), provenance, "width", minimum=1)
    module = text_tower(config.text, tokenizer, width)
    mean = jax.ShapeDtypeStruct((width,), jnp.float32)
    shapes = jax.eval_shape(lambda mean: init_params(module, config, mean), mean)
    return Model(
        name=name,
        step=values["step"],
        average=values["average"],
        tower_json=provenance,
        config=config.text,
        loss=config.loss,
        tokenizer=tokenizer,
        params=_read_params(path, shapes, vision=False),
        receipt=_read_receipt(path),
        open_tower=lambda: _read_vision_tower(path, provenance),
    )


def _read_vision_tower(path: str, provenance: dict[str, Any]) -> FrozenTower:
    tower_path = join(path, TOWER)
    try:
        if provenance["dtype"] not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {provenance['dtype']!r}")
        if type(tower_options(provenance).get("max_pixels", 0)) is not int:
            raise TypeError("max_pixels is not a number")
        if provenance["architecture"] in LIBRARIES:
            tower = torch_tower_from_provenance(
                provenance, path, lambda shapes: _read_arrays(path, shapes, vision=True)
            )
        else:
            tower = _read_vit(path, provenance)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(tower_path, f"{type(error).__name__} {error}") from None
    if not _is_trained_tower(tower, provenance):
        raise _damaged(tower_path, "its identity is that of another tower")
    return tower


def _read_vit(path: str, provenance: dict[str, Any]) -> Tower:
    architecture, preprocess = from_provenance(provenance)
    images = jax.ShapeDtypeStruct((1, preprocess.size, preprocess.size, 3), jnp.float32)
    shapes = jax.eval_shape(ViT(architecture).init, jax.random.key(0), images)["params"]
    return Tower(
        name=provenance["name"],
        source=path,
        sha256=str(provenance.get("sha256")),
        architecture=architecture,
        preprocess=preprocess,
        params=_read_params(path, shapes, vision=True),
        resampled=provenance.get("positions"),
    )


def _is_trained_tower(tower: FrozenTower, provenance: dict[str, Any]) -> bool:
    """Return whether a tower computes features of this provenance."""
    return bool(tower.provenance(provenance["dtype"])["identity"] == first_view(provenance))


def _read_receipt(path: str) -> dict[str, Any] | None:
    receipt = join(path, RECEIPT)
    return read_object(receipt) if is_file(receipt) else None


def _read_params(path: str, shapes: Any, *, vision: bool) -> Params:
    """Read the parameters of the vision tower, or all others.

    Nothing is read unless all have the names and shapes of the tree `shapes`.
    """
    named = {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}
    return nested(_read_arrays(path, named, vision=vision), join(path, WEIGHTS))


def _read_arrays(path: str, shapes: dict[str, tuple[int, ...]], *, vision: bool) -> dict[str, np.ndarray]:
    """Read the float32 arrays of these names and shapes, which must be all of the vision tower's, or all others."""
    weights, prefix = join(path, WEIGHTS), "img/" if vision else ""
    expected = {prefix + name: shape for name, shape in shapes.items()}
    with open_safetensors(weights) as file:
        found = {
            name: shape
            for name, shape in file.shapes.items()
            if vision == (name.startswith("img/") and not name.startswith("img/head/"))
        }
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                wanted = expected.get(name, "no such array")
                problem = f"has shape {found[name]}, expected {wanted}" if name in found else "is missing"
                raise UserError(
                    f"{weights} does not match the files beside it: {name} {problem}; export the model again"
                )
        return {name.removeprefix(prefix): file.take(name) for name in expected}


def _read_config(path: str, values: dict[str, Any]) -> Config:
    """Build the config of the text tower and the loss from `config.json`."""
    for section, keys in (("text", TEXT_KEYS), ("loss", LOSS_KEYS)):
        for key in keys:
            if key not in values[section]:  # a default would give another model
                raise _damaged(path, f"{section}.{key} is missing")
    for key, value in values["text"].items():
        if type(value) is int:
            _read_size(path, values["text"], key)
    config = build_config(flatten_toml({"text": values["text"], "loss": values["loss"]}), f"in {path}")
    if config.text.shape.heads < 1 or config.text.shape.width % config.text.shape.heads:
        raise _damaged(path, str(config.text.shape))
    return config


def _read_size(path: str, values: dict[str, Any], key: str, minimum: int = 0) -> int:
    size = values.get(key)
    if type(size) is not int or not minimum <= size <= _MAX_SIZE:
        raise _damaged(path, f"{key} is {str(size)[:40]!r}")
    return size


def _damaged(path: str, problem: str) -> UserError:
    return UserError(f"{path} is damaged: {problem}; export the model again")
