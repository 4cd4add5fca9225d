"""Load frozen vision towers: weights, architecture, preprocessing and pooling.

`FrozenTower.provenance` records all of them. Its `identity` is a digest over the record, so that two feature stores
with the same identity have the same features. Layouts of files are in `lit_fast/towers/layouts.py`. `Tower` is
lit_fast's own ViT; all other models are towers of `lit_fast.towers.torch`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.errors import UnsupportedModelError, UserError
from lit_fast.models.architecture import GELUS, POOLS, Architecture, from_record
from lit_fast.models.two_towers import image_tower_params
from lit_fast.models.vit import ViT
from lit_fast.runs.run import Run
from lit_fast.storage.files import exists
from lit_fast.storage.paths import is_url, parent, stem, suffix
from lit_fast.storage.paths import name as base_name
from lit_fast.towers.interface import FrozenTower
from lit_fast.towers.layouts import PreprocessAt, TowerFiles, find_files, load_weights, published_preprocess
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.torch import packages
from lit_fast.towers.torch.load import load_torch_tower
from lit_fast.towers.trained import params_digest
from lit_fast.utils.output import status
from lit_fast.weights.parameters import Params, Weights
from lit_fast.weights.positions import resample_positions
from lit_fast.weights.reader import unusable_weights
from lit_fast.weights.resolve import BUCKETS, weights_digest

# Larger values in a file would need more memory than any machine has.
_MAX_RESOLUTION = 4096
_MAX_GRID = 256


@dataclass(frozen=True)
class Tower(FrozenTower):
    """A frozen ViT of lit_fast's own code; `params` are float32 under big_vision's names.

    Attributes:
      architecture: shapes, pooling and non-linearity.
      resampled: rule by which the positions were resampled; None: they were not.
    """

    architecture: Architecture
    resampled: str | None

    @property
    def width(self) -> int:
        """Return the length of a feature vector."""
        return self.architecture.width

    def features(self, params: Params, images: jax.Array, dtype: Any) -> jax.Array:
        """Compute features of any float type [n, width] of normalized images float32 [n, size, size, 3]."""
        return ViT(self.architecture, dtype).apply({"params": params}, images)  # type: ignore[return-value]

    def record(self) -> dict[str, Any]:
        """Return everything that affects the features, but for the dtype."""
        return self._record

    @cached_property
    def _record(self) -> dict[str, Any]:
        a = self.architecture
        # Absent where they have the values of a plain ViT, so that a new field changes no digest.
        optional = {
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
            **{name: value for name, value in optional.items() if value is not None},
        }


def from_provenance(provenance: dict[str, Any]) -> tuple[Architecture, Preprocess]:
    """Return the architecture and preprocessing that `Tower.provenance` recorded in `tower.json`.

    Raises:
      KeyError, TypeError, ValueError: a value is missing or invalid.
    """
    architecture = from_record(provenance)
    preprocess = Preprocess.from_dict(provenance["preprocess"])
    if not 0 < preprocess.size // architecture.patch <= _MAX_GRID:
        raise ValueError(f"{preprocess.size} pixels in patches of {architecture.patch}")
    return architecture, preprocess


def trained_tower(run: Run) -> Tower:
    """Return the image tower that a run has trained, with the weights that are restored.

    Raises:
      UserError: its `tower.json` is damaged.
    """
    try:
        architecture, preprocess = from_provenance(run.tower_json)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.path}/tower.json is damaged: {type(error).__name__} {error}; restore it"
        ) from None
    params = jax.tree.map(np.asarray, image_tower_params(run.params))
    return Tower(
        name=run.name,
        source=_source(run.path),
        sha256=params_digest(params),
        architecture=architecture,
        preprocess=preprocess,
        params=params,
        resampled=None,
    )


def load_tower(
    spec: str,
    *,
    pool: str | None = None,
    preprocess: str | None = None,
    resolution: int | None = None,
    gelu: str | None = None,
    backend: str | None = None,
    arch: str | None = None,
) -> FrozenTower:
    """Load a vision tower from a file, a directory or a name, see `lit_fast.towers.layouts.find_files`.

    * `.npz`: AugReg and big_vision, old and new names, with or without head. Defaults are timm's for these
      weights (bicubic resize and centre crop by 0.9, from 384 pixels on 1.0; exact GELU); with a MAP head
      (ViT-g, ViT-G, SigLIP) big_vision's (squash; tanh). AugReg's weights were trained with `gelu="tanh"`.
    * A directory with `config.json` and `model.safetensors`, whole or in parts, or one of these files: ViT, DeiT,
      DINOv2, CLIP and SigLIP of transformers or timm, with their own preprocessing.
    * The directory of a run that trained its image tower, or of an exported model: with its weights and preprocessing.
    * Any other model of timm, open_clip or transformers is computed by its own code, see `lit_fast.towers.torch`.

    Args:
      spec: path or name.
      pool: one of `POOLS` instead of the family's own; the weights must have its parameters.
      preprocess: a method of `lit_fast.towers.preprocess` instead of the tower's own.
      resolution: pixels; positions are resampled by the rule of the family.
      gelu: one of `GELUS` instead of the family's own.
      backend: "jax" or "torch"; None: lit_fast's own model where there is one.
      arch: name of the architecture of a `.safetensors` without configuration.

    Raises:
      UserError: there is no such file or name, no code computes the model, or an option does not fit it.
    """
    if resolution is not None and not 0 < resolution <= _MAX_RESOLUTION:
        raise UserError(f"resolution must be between 1 and {_MAX_RESOLUTION} pixels, not {resolution}")
    if backend not in (None, "jax", "torch"):
        raise UserError(f"backend must be jax or torch, not {backend!r}")
    files = find_files(spec, arch)
    if backend != "torch":
        try:
            return _load_vit(spec, arch, files, pool, preprocess, resolution, gelu)
        except UnsupportedModelError as error:
            if backend == "jax":
                raise
            if not packages.installed("torchax"):
                raise UserError(
                    f"{error.problem}; to use PyTorch's code for it run: {packages.EXTRA}"
                ) from None
    if gelu is not None:
        raise UserError(f"gelu is for lit_fast's own ViTs, which {spec} is not here; leave it out")
    weights = load_weights(files) if files.kind == "npz" else None
    preprocess_at = published_preprocess(files, weights, preprocess)
    published = preprocess_at(None)
    _check_resolution(resolution, published)
    size = resolution or published.size
    return load_torch_tower(
        files,
        _name(spec, files.path, arch),
        _source(spec),
        _preprocess(preprocess_at, size, preprocess),
        pool,
        resolution,
        weights.architecture if weights else None,
    )


def _load_vit(
    spec: str,
    arch: str | None,
    files: TowerFiles,
    pool: str | None,
    preprocess: str | None,
    resolution: int | None,
    gelu: str | None,
) -> Tower:
    """Load a tower of lit_fast's own code; arguments and errors as of `load_tower`."""
    path, weights = files.path, load_weights(files)
    preprocess_at = published_preprocess(files, weights, preprocess)
    architecture = _with_options(weights, pool, gelu, path)
    heads = {"MAPHead_0": "map", "projection": "projection"}  # parameters of one pooling only
    params = {k: v for k, v in weights.params.items() if heads.get(k) in (None, architecture.pool)}
    patch, grid = architecture.patch, math.isqrt(params["pos_embedding"].shape[1])
    _check_shapes(params, architecture, grid, path)
    published = preprocess_at(None)
    size = resolution or published.size
    if size != published.size and size % patch:
        raise UserError(
            f"resolution {size} is not a multiple of the tower's patch size {patch}; use a multiple"
        )
    if not 0 < size // patch <= _MAX_GRID:
        raise UserError(
            f"resolution {size} is not 1 to {_MAX_GRID} patches of {patch} pixels; choose another --resolution"
        )
    _check_resolution(resolution, published)
    positions = resample_positions(params["pos_embedding"], size // patch, weights.resampling)
    return Tower(
        name=_name(spec, path, arch),
        source=_source(spec),
        sha256=params_digest(weights.params) if files.kind in ("run", "export") else weights_digest(path),
        architecture=architecture,
        preprocess=_preprocess(preprocess_at, size, preprocess),
        params=params | {"pos_embedding": positions},
        resampled=weights.resampling if size // patch != grid else None,
    )


def _with_options(weights: Weights, pool: str | None, gelu: str | None, path: str) -> Architecture:
    """Return the architecture of the weights with the user's options."""
    a, params = weights.architecture, weights.params
    if gelu is not None and gelu != a.gelu:
        if gelu not in GELUS:
            raise UserError(f"gelu must be one of {', '.join(GELUS)}, not {gelu!r}")
        if a.gelu == "swiglu":
            raise UserError(f"{path} has SwiGLU layers, which gelu {gelu!r} does not fit; leave it out")
        a = dataclasses.replace(a, gelu=gelu)
    if pool is None:
        return a
    available = {
        "tok": a.class_token,
        "gap": True,
        "map": "MAPHead_0" in params,
        "projection": "projection" in params,
    }
    if not available.get(pool):
        choices = ", ".join(p for p in POOLS if available[p])
        raise UserError(f"pool {pool!r} does not fit the weights of {path}; choose from {choices}")
    return dataclasses.replace(a, pool=pool)


def _preprocess(preprocess_at: PreprocessAt, size: int, method: str | None) -> Preprocess:
    """Return the published preprocessing at `size` pixels, or another method with its mean and std."""
    try:
        published = preprocess_at(size)
        if method in (None, published.method):
            return published
        resize = size if "squash" in str(method) else max(size, published.resize)
        return Preprocess(str(method), size, resize, published.mean, published.std)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_resolution(resolution: int | None, published: Preprocess) -> None:
    """Question a resolution at which hardly any detail of an image is left."""
    if resolution and resolution < published.size / 4:
        status(f"note: {resolution} pixels are less than a quarter of the tower's {published.size}")


def _source(spec: str) -> str:
    return os.path.abspath(spec) if not is_url(spec) and exists(spec) else spec


def _name(spec: str, path: str, arch: str | None) -> str:
    """Return the name of the directory of the features: the file's, its directory's, or the repository's.

    A file of Google's buckets has the last part of the name that it is known by, such as B_8 of augreg/B_8.
    """
    if spec.partition("/")[0] in BUCKETS and not exists(spec):
        return base_name(spec).removesuffix(".npz")
    if suffix(path) == ".npz" or arch:
        return stem(path)
    if exists(spec):
        return base_name(parent(path if is_url(path) else os.path.abspath(path)))
    return spec.rpartition(":")[2].replace("/", "-").replace("@", "-")


def _check_shapes(params: Params, a: Architecture, grid: int, path: str) -> None:
    """Check that the parameters are exactly those of the model, with its shapes.

    Raises:
      UserError: names the first that differs.
    """
    images = jax.ShapeDtypeStruct((1, grid * a.patch, grid * a.patch, 3), jnp.float32)
    wanted = jax.eval_shape(ViT(a).init, jax.random.key(0), images)["params"]
    want = {k: v.shape for k, v in flatten_dict(wanted, sep="/").items()}
    have = {k: v.shape for k, v in flatten_dict(params, sep="/").items()}
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            raise unusable_weights(path, f"{name} is missing")
        if name not in want:
            raise unusable_weights(path, f"{name} is a parameter that this ViT does not have")
        if want[name] != have[name]:
            raise unusable_weights(path, f"{name} has shape {have[name]}, the ViT needs {want[name]}")
