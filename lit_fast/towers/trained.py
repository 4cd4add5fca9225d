"""Image towers that lit_fast has trained, read from the directory of a run or of an exported model."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.errors import UnsupportedModelError, UserError
from lit_fast.models.architecture import from_record
from lit_fast.models.two_towers import image_tower_params
from lit_fast.runs.run import open_run
from lit_fast.storage.files import is_file
from lit_fast.storage.paths import join, suffix
from lit_fast.towers.preprocess import Preprocess
from lit_fast.weights.parameters import Params, Weights, nested
from lit_fast.weights.reader import open_safetensors

RUN_CONFIG = "config.toml"
_WEIGHTS = "model.safetensors"
_RESAMPLING = "linear"  # big_vision's rule, see lit_fast.weights.positions


def is_run(spec: str) -> bool:
    """Whether `spec` is the directory of a run."""
    if suffix(spec) in (".npz", ".safetensors", ".json"):  # of a file at a URL each question is a request
        return False
    return is_file(join(spec, RUN_CONFIG)) and is_file(join(spec, "tower.json"))


def load_trained(kind: str, path: str, record: dict[str, Any]) -> Weights:
    """Load the image tower of a run's last checkpoint, or of an exported model.

    Args:
      kind: "run" or "export".
      path: the directory.
      record: its `tower.json`.

    Raises:
      UnsupportedModelError: it is no ViT of lit_fast's own code.
      UserError: the run trained no image tower, or a file is damaged.
    """
    if record.get("architecture") != "vit":
        raise UnsupportedModelError(
            f"the vision tower of {path} has no code of lit_fast's own; use --backend torch"
        )
    try:
        architecture = from_record(record)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{join(path, 'tower.json')} is damaged: {type(error).__name__} {error}; restore it"
        ) from None
    if kind == "export":
        return Weights(_exported_params(join(path, _WEIGHTS)), architecture, _RESAMPLING)
    run = open_run(path)
    if not run.config.image.trained:
        raise UserError(
            f"run {path} trained no image tower; name the one that it used: --tower {record['source']}"
        )
    return Weights(jax.tree.map(np.asarray, image_tower_params(run.params)), architecture, _RESAMPLING)


def _exported_params(path: str) -> Params:
    with open_safetensors(path) as file:
        names = [n for n in file.shapes if n.startswith("img/") and not n.startswith("img/head/")]
        return nested({n.removeprefix("img/"): file.take(n) for n in names}, path)


def recorded_preprocess(record: dict[str, Any], where: str) -> Preprocess:
    """Return the preprocessing of a `tower.json`.

    Raises:
      UserError: it is damaged.
    """
    try:
        return Preprocess.from_dict(record["preprocess"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged: {type(error).__name__} {error}; restore it") from None


def params_digest(params: Params) -> str:
    """Return the SHA-256 of a tree of arrays, with their names and shapes."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
