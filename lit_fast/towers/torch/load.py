"""Load a tower of timm, open_clip or transformers, or build one again from its provenance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture
from lit_fast.storage.cache import local_copy
from lit_fast.towers.layouts import TowerFiles
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.torch.packages import require
from lit_fast.weights.reader import open_safetensors
from lit_fast.weights.resolve import weights_digest

LIBRARIES = ("timm", "open_clip", "transformers")


def load_torch_tower(
    files: TowerFiles,
    name: str,
    source: str,
    preprocess: Preprocess,
    pool: str | None,
    resolution: int | None,
    vit: Architecture | None = None,
) -> Any:
    """Load a tower of a library.

    Args:
      files: those of the tower.
      name: default name of the feature directory.
      source: what `load_tower` is called with.
      preprocess: from the bytes of an image to pixels.
      pool: None for the model's own.
      resolution: pixels, None for the model's own.
      vit: the architecture of a `.npz`.

    Returns:
      A `TorchTower`.

    Raises:
      UserError: the extra `torch` is missing, the library has no such model, the weights do not fit it, or JAX cannot
        trace it.
    """
    _require("timm" if files.kind == "npz" else files.kind)
    from lit_fast.towers.torch import open_clip, timm, transformers
    from lit_fast.towers.torch.state import read_tensors

    if vit:
        recipe = timm.vit_recipe(vit, preprocess.size, pool)
        body = timm.build(recipe, npz=local_copy(files.path, in_parts=True))
    elif files.kind == "transformers":
        recipe = transformers.recipe(files.config, files.where, pool, resolution)
        body = transformers.build(recipe, files.path)
    else:
        with open_safetensors(files.path) as file:
            if files.kind == "timm":
                is_zero: Callable[[str], bool] = lambda name: not file.take(name).any()  # noqa: E731
                recipe = timm.recipe(files.config, files.where, file.shapes, is_zero, pool, resolution)
                body = timm.build(recipe, read_tensors(file))
            else:
                recipe = open_clip.recipe(files.config, files.where, pool, resolution)
                whole = any(name.startswith(open_clip.PREFIX) for name in file.shapes)
                tensors = read_tensors(file, lambda name: not whole or name.startswith(open_clip.PREFIX))
                body = open_clip.build(recipe, tensors)
    return model_tower(name, source, weights_digest(files.path), preprocess, body, recipe)


def torch_tower_from_provenance(
    provenance: dict[str, Any],
    source: str,
    read: Callable[[dict[str, tuple[int, ...]]], dict[str, np.ndarray]],
) -> Any:
    """Build the tower that `tower.json` records.

    Args:
      provenance: content of `tower.json`.
      source: where the weights come from.
      read: returns the float32 arrays of these names and shapes.

    Returns:
      A `TorchTower`.

    Raises:
      KeyError, TypeError, ValueError: a value is missing or invalid.
      UserError: the extra `torch` is missing, or this version of the library cannot build the model.
    """
    preprocess, recipe = Preprocess.from_dict(provenance["preprocess"]), recipe_of(provenance)
    body = build(recipe)
    from lit_fast.towers.torch.tower import fill, stored_shapes

    fill(body.module, read(stored_shapes(body.module)))
    return model_tower(
        str(provenance["name"]), source, str(provenance.get("sha256")), preprocess, body, recipe
    )


def recipe_of(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `tower.json` that a library builds a model from.

    Raises:
      KeyError, TypeError, ValueError: a value is missing or invalid.
    """
    library = provenance["architecture"]
    keys: dict[str, type | tuple[type, ...]] = {"model": str, "arguments": dict, "pool": str}
    if library == "timm":
        keys |= {"settings": dict, "classes": int}
    else:
        keys |= {"resolution": (int, type(None))}
    for key, kind in keys.items():
        if not isinstance(provenance[key], kind):
            raise TypeError(f"{key} is {str(provenance[key])[:40]!r}")
    return {"architecture": library, **{key: provenance[key] for key in keys}}


def build(recipe: dict[str, Any]) -> Any:
    """Return the `Body` of a recipe, with random weights.

    Raises:
      UserError: the extra `torch` is missing, or the library cannot build it.
    """
    library = recipe["architecture"]
    _require(library)
    from lit_fast.towers.torch import open_clip, timm, transformers

    if library == "transformers":
        return transformers.build(recipe)
    return timm.build(recipe) if library == "timm" else open_clip.build(recipe)


def _require(library: str) -> None:
    if library not in LIBRARIES:
        raise UserError(f"library {library!r} has no vision towers; choose from {', '.join(LIBRARIES)}")
    require("torchax")
    require(library)


def model_tower(
    name: str, source: str, digest: str, preprocess: Preprocess, body: Any, recipe: dict[str, Any]
) -> Any:
    """Return the `TorchTower` of a `Body`, after it has been traced once.

    Raises:
      UserError: JAX cannot trace it.
    """
    from lit_fast.towers.torch import trace
    from lit_fast.towers.torch.tower import TorchTower

    tower = TorchTower(name, source, digest, preprocess, trace.arrays(body.module), body, recipe)
    _ = tower.width  # traces it
    return tower
