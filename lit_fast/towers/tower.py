"""Towers: frozen vision models with everything that decides their features.

A tower is weights + architecture + preprocessing + pooling. `provenance` writes that down, and its
`identity` is a digest over all of it, so that two stores with one identity hold the same features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.errors import UserError
from lit_fast.models.architecture import POOLS, Architecture
from lit_fast.models.sizes import Shape
from lit_fast.models.vit import ViT
from lit_fast.storage.files import read_object
from lit_fast.towers import preprocess_config as processors
from lit_fast.towers.preprocess import Preprocess
from lit_fast.version import __version__
from lit_fast.weights.huggingface import load_huggingface
from lit_fast.weights.npz import load_npz
from lit_fast.weights.parameters import Params, Weights
from lit_fast.weights.positions import resample_positions
from lit_fast.weights.resolve import local_weights, weights_digest
from lit_fast.weights.timm import load_timm

GELUS = ("exact", "tanh", "quick")
# A resolution beyond these would ask for more memory than any machine has.
_MAX_RESOLUTION = 4096
_MAX_GRID = 256
_MAX_SIZE = 1 << 20

# The tower's own preprocessing, at its own or another resolution.
_Native = Callable[[int | None], Preprocess]


@dataclass(frozen=True)
class Tower:
    """A frozen vision tower, ready to embed."""

    name: str  # default name of the feature directory
    source: str  # the file or name that `load_tower` takes
    sha256: str  # of the weights; of several parts, a digest of theirs
    architecture: Architecture
    preprocess: Preprocess
    params: Params  # float32 numpy arrays
    resampled: str | None  # rule by which the positions were resampled, if they were

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return self.architecture.width

    def embed(self, params: Params, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Features of uint8 images [n, size, size, 3] as float32 [n, width]; pure, for jit.

        `dtype` is the precision of the matrix products; LayerNorm statistics and softmax are float32.
        """
        mean, std = (np.asarray(v, np.float32) for v in (self.preprocess.mean, self.preprocess.std))
        x = (images.astype(jnp.float32) / 255.0 - mean) / std
        model = ViT(self.architecture, dtype)
        precision = "highest" if dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):  # float32 means float32 on accelerators too
            return model.apply({"params": params}, x)  # type: ignore[return-value]

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        a = self.architecture
        # What plain ViTs do not have is named only where it is: a digest must not change by a new field.
        further = {
            "encoder_width": a.shape.width if a.width != a.shape.width else None,
            "class_token": a.class_token if a.class_token != (a.pool == "tok") else None,
            "registers": a.registers or None,
            "pre_norm": a.pre_norm or None,
            "norm_after_pool": a.norm_after_pool or None,
            "positions": self.resampled if self.resampled != "linear" else None,
        }
        return {
            "sha256": self.sha256,
            "architecture": "vit",
            **a.shape._asdict(),
            "width": a.width,
            "patch": a.patch,
            "pool": a.pool,
            "gelu": a.gelu,
            "layer_norm_epsilon": a.epsilon,
            "preprocess": self.preprocess.to_dict(),
            **{name: value for name, value in further.items() if value is not None},
        }

    def provenance(self, dtype: str) -> dict[str, Any]:
        """The content of `tower.json`; `identity` covers all that decides the features."""
        recipe = self._recipe | {"dtype": dtype}
        text = json.dumps(recipe, sort_keys=True).encode()
        return {
            "name": self.name,
            "source": self.source,
            "identity": hashlib.blake2b(text, digest_size=16).hexdigest(),
            **recipe,
            "versions": {"lit_fast": __version__, "jax": jax.__version__},
        }


def described(told: dict[str, Any]) -> tuple[Architecture, Preprocess]:
    """The inverse of `Tower.provenance`, from the content of `tower.json`.

    Raises:
      KeyError, TypeError, ValueError: something is missing or makes no sense.
    """
    width, pool, gelu = told["width"], told["pool"], told["gelu"]
    if told["architecture"] != "vit" or pool not in POOLS or gelu not in (*GELUS, "swiglu"):
        raise ValueError(f"architecture {told['architecture']!r}, pool {pool!r}, gelu {gelu!r}")
    shape = Shape(told.get("encoder_width", width), told["depth"], told["mlp_dim"], told["heads"])
    architecture = Architecture(
        shape=shape,
        patch=told["patch"],
        pool=pool,
        gelu=gelu,
        epsilon=told["layer_norm_epsilon"],
        class_token=told.get("class_token", pool == "tok"),
        registers=told.get("registers", 0),
        pre_norm=told.get("pre_norm", False),
        norm_after_pool=told.get("norm_after_pool", False),
        projection=width if pool == "projection" else 0,
    )
    preprocess = Preprocess.from_dict(told["preprocess"])
    sizes = (width, *shape, architecture.patch, architecture.registers + 1)
    if not all(type(n) is int and 0 < n <= _MAX_SIZE for n in sizes) or shape.width % shape.heads:
        raise ValueError(f"sizes {sizes}")
    if not 0 < preprocess.size // architecture.patch <= _MAX_GRID:
        raise ValueError(f"{preprocess.size} pixels in patches of {architecture.patch}")
    if type(architecture.epsilon) is not float:
        raise TypeError(f"layer_norm_epsilon {architecture.epsilon!r}")
    return architecture, preprocess


def load_tower(
    spec: str,
    *,
    pool: str | None = None,
    preprocess: str | None = None,
    resolution: int | None = None,
    gelu: str | None = None,
) -> Tower:
    """Load a vision tower from a file, a directory or a name that `lit_fast.storage.hub` knows.

    * `.npz`: AugReg and big_vision, old and new names, with or without head. Defaults are timm's for these
      weights (bicubic resize and centre crop by 0.9, from 384 pixels on 1.0; exact GELU); with a MAP head
      (ViT-g, ViT-G, SigLIP) big_vision's (squash; tanh). `gelu="tanh"` is the function that AugReg's weights
      were trained with.
    * a directory with `config.json` and `model.safetensors`, whole or in parts, or one of these files: ViT,
      DeiT, DINOv2, CLIP, SigLIP as transformers or timm write them, with their own preprocessing.

    Args:
      spec: path or name.
      pool: one of `POOLS` instead of the family's own; the weights must hold what it needs.
      preprocess: a method of `lit_fast.towers.preprocess` instead of the tower's own.
      resolution: pixels; the positions are resampled by the rule of the weights' own code.
      gelu: one of `GELUS` instead of the family's own.

    Raises:
      UserError: no such file or name, not a ViT, or an option that does not fit it.
    """
    if resolution is not None and not 0 < resolution <= _MAX_RESOLUTION:
        raise UserError(f"resolution {resolution} is not between 1 and {_MAX_RESOLUTION} pixels")
    path = local_weights(spec)
    weights, native = _load_npz(path) if path.suffix == ".npz" else _load_safetensors(path)
    architecture = _chosen(weights, pool, gelu, path)
    params = _used(weights.params, architecture)
    patch, grid = architecture.patch, math.isqrt(params["pos_embedding"].shape[1])
    _check_shapes(params, architecture, grid, path)
    own = native(None)
    size = resolution or own.size
    if size != own.size and size % patch:
        raise UserError(f"resolution {size} is not a multiple of the tower's patch size {patch}")
    if not 0 < size // patch <= _MAX_GRID:
        raise UserError(f"{path}: {size} pixels are not between 1 and {_MAX_GRID} patches of {patch} pixels")
    positions = resample_positions(params["pos_embedding"], size // patch, weights.resampling)
    return Tower(
        name=_name(spec, path),
        source=os.path.abspath(spec) if Path(spec).exists() else spec,
        sha256=weights_digest(path),
        architecture=architecture,
        preprocess=_preprocess(native, size, preprocess),
        params=params | {"pos_embedding": positions},
        resampled=weights.resampling if size // patch != grid else None,
    )


def _load_npz(path: Path) -> tuple[Weights, _Native]:
    weights = load_npz(path)
    trained = weights.architecture.patch * math.isqrt(weights.params["pos_embedding"].shape[1])

    def native(resolution: int | None) -> Preprocess:
        size = resolution or trained
        if "MAPHead_0" in weights.params:
            return Preprocess("tf-squash", size, size)
        return Preprocess("pil-crop", size, math.floor(size / (1.0 if size >= 384 else 0.9)))

    return weights, native


def _load_safetensors(path: Path) -> tuple[Weights, _Native]:
    where = path.parent / "config.json"
    config = read_object(where)
    cfg = config.get("pretrained_cfg")
    if "architecture" in config and isinstance(cfg, dict):

        def native(resolution: int | None) -> Preprocess:
            size = {"input_size": [3, resolution, resolution]} if resolution else {}
            return processors.timm(cfg | size, where)

        return load_timm(path, config, where), native
    weights = load_huggingface(path, config, where)
    file = path.parent / "preprocessor_config.json"
    own = processors.huggingface(read_object(file), file)

    def scaled(resolution: int | None) -> Preprocess:
        size = resolution or own.size
        return dataclasses.replace(own, size=size, resize=own.resize * size // own.size)

    return weights, scaled


def _chosen(weights: Weights, pool: str | None, gelu: str | None, path: Path) -> Architecture:
    """The weights' architecture with the user's choices."""
    a, params = weights.architecture, weights.params
    if gelu is not None and gelu != a.gelu:
        if gelu not in GELUS:
            raise UserError(f"gelu must be one of {', '.join(GELUS)}, not {gelu!r}")
        if a.gelu == "swiglu":
            raise UserError(f"{path} has SwiGLU layers; gelu {gelu!r} does not fit them")
        a = dataclasses.replace(a, gelu=gelu)
    if pool is None:
        return a
    possible = {
        "tok": a.class_token,
        "gap": True,
        "map": "MAPHead_0" in params,
        "projection": "projection" in params,
    }
    if not possible.get(pool):
        there = ", ".join(p for p in POOLS if possible[p])
        raise UserError(f"pool {pool!r} does not fit {path}, whose weights allow {there}")
    return dataclasses.replace(a, pool=pool)


def _used(params: Params, a: Architecture) -> Params:
    """The parameters without those of poolings that were not chosen."""
    unused = {"MAPHead_0": "map", "projection": "projection"}
    return {name: tree for name, tree in params.items() if unused.get(name) in (None, a.pool)}


def _preprocess(native: _Native, size: int, method: str | None) -> Preprocess:
    """The tower's own preprocessing at `size` pixels, or another method with its mean and std."""
    try:
        own = native(size)
        if method in (None, own.method):
            return own
        resize = size if "squash" in str(method) else max(size, own.resize)
        return Preprocess(str(method), size, resize, own.mean, own.std)
    except ValueError as error:
        raise UserError(str(error)) from None


def _name(spec: str, path: Path) -> str:
    """A name for the directory of the features: the file's, its directory's, or what follows a scheme."""
    if path.suffix == ".npz":
        return path.stem
    if Path(spec).exists():
        return path.absolute().parent.name
    return spec.partition(":")[2].replace("/", "-").replace("@", "-")


def _check_shapes(params: Params, a: Architecture, grid: int, path: Path) -> None:
    """Every parameter of the model must be in the file, in the right shape, and nothing else."""
    images = jax.ShapeDtypeStruct((1, grid * a.patch, grid * a.patch, 3), jnp.float32)
    wanted = jax.eval_shape(ViT(a).init, jax.random.key(0), images)["params"]
    want = {k: v.shape for k, v in flatten_dict(wanted, sep="/").items()}
    have = {k: v.shape for k, v in flatten_dict(params, sep="/").items()}
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            raise UserError(f"{path}: {name} is missing")
        if name not in want:
            raise UserError(f"{path}: {name} does not belong to this kind of ViT")
        if want[name] != have[name]:
            raise UserError(f"{path}: {name} has shape {have[name]}, the ViT needs {want[name]}")
