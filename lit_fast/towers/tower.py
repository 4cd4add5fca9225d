"""Frozen vision towers: weights, architecture, preprocessing and pooling.

`Tower.provenance` records all of them. Its `identity` is a digest over the record, so that two feature stores with the
same identity have the same features. Layouts of files are in `lit_fast/towers/layouts.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.errors import UserError
from lit_fast.models.architecture import POOLS, Architecture
from lit_fast.models.sizes import Shape
from lit_fast.models.vit import ViT
from lit_fast.storage.files import exists
from lit_fast.storage.paths import is_url, parent, stem, suffix
from lit_fast.storage.paths import name as base_name
from lit_fast.towers.layouts import PreprocessAt, load_layout
from lit_fast.towers.preprocess import Preprocess
from lit_fast.version import __version__
from lit_fast.weights.parameters import Params, Weights
from lit_fast.weights.positions import resample_positions
from lit_fast.weights.resolve import local_weights, weights_digest

GELUS = ("exact", "tanh", "quick")
# Larger values in a file would need more memory than any machine has.
_MAX_RESOLUTION = 4096
_MAX_GRID = 256
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class Tower:
    """A frozen vision tower.

    Attributes:
      name: default name of the feature directory.
      source: the argument of `load_tower`, as an absolute path or a name.
      sha256: digest of the weights; of several parts, a digest of their digests.
      architecture: shapes, pooling and non-linearity.
      preprocess: from the bytes of an image to pixels.
      params: float32 numpy arrays under big_vision's names.
      resampled: rule by which the positions were resampled; None: they were not.
    """

    name: str
    source: str
    sha256: str
    architecture: Architecture
    preprocess: Preprocess
    params: Params
    resampled: str | None

    @property
    def width(self) -> int:
        """Return the length of a feature vector."""
        return self.architecture.width

    def embed(self, params: Params, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Compute the features of images; a pure function for `jax.jit`.

        Args:
          params: those of the tower, on the devices.
          images: uint8 [n, size, size, 3].
          dtype: precision of the matrix products; LayerNorm statistics and softmax are float32.

        Returns:
          float32 [n, width].
        """
        mean, std = (np.asarray(v, np.float32) for v in (self.preprocess.mean, self.preprocess.std))
        x = (images.astype(jnp.float32) / 255.0 - mean) / std
        model = ViT(self.architecture, dtype)
        precision = "highest" if dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):  # float32 means float32 on accelerators too
            return model.apply({"params": params}, x)  # type: ignore[return-value]

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

    def provenance(self, dtype: str) -> dict[str, Any]:
        """Return the content of `tower.json`; `identity` is a digest of everything that affects the features."""
        record = self._record | {"dtype": dtype}
        text = json.dumps(record, sort_keys=True).encode()
        return {
            "name": self.name,
            "source": self.source,
            "identity": hashlib.blake2b(text, digest_size=16).hexdigest(),
            **record,
            "versions": {"lit_fast": __version__, "jax": jax.__version__},
        }


def from_provenance(provenance: dict[str, Any]) -> tuple[Architecture, Preprocess]:
    """Return the architecture and preprocessing that `Tower.provenance` recorded in `tower.json`.

    Raises:
      KeyError, TypeError, ValueError: a value is missing or invalid.
    """
    width, pool, gelu = provenance["width"], provenance["pool"], provenance["gelu"]
    if provenance["architecture"] != "vit" or pool not in POOLS or gelu not in (*GELUS, "swiglu"):
        raise ValueError(f"architecture {provenance['architecture']!r}, pool {pool!r}, gelu {gelu!r}")
    shape = Shape(
        provenance.get("encoder_width", width),
        provenance["depth"],
        provenance["mlp_dim"],
        provenance["heads"],
    )
    architecture = Architecture(
        shape=shape,
        patch=provenance["patch"],
        pool=pool,
        gelu=gelu,
        epsilon=provenance["layer_norm_epsilon"],
        class_token=provenance.get("class_token", pool == "tok"),
        registers=provenance.get("registers", 0),
        pre_norm=provenance.get("pre_norm", False),
        norm_after_pool=provenance.get("norm_after_pool", False),
        projection=width if pool == "projection" else 0,
    )
    preprocess = Preprocess.from_dict(provenance["preprocess"])
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
    """Load a vision tower from a file, a directory or a name, see `lit_fast.weights.resolve`.

    * `.npz`: AugReg and big_vision, old and new names, with or without head. Defaults are timm's for these
      weights (bicubic resize and centre crop by 0.9, from 384 pixels on 1.0; exact GELU); with a MAP head
      (ViT-g, ViT-G, SigLIP) big_vision's (squash; tanh). AugReg's weights were trained with `gelu="tanh"`.
    * A directory with `config.json` and `model.safetensors`, whole or in parts, or one of these files: ViT, DeiT,
      DINOv2, CLIP and SigLIP of transformers or timm, with their own preprocessing.

    Args:
      spec: path or name.
      pool: one of `POOLS` instead of the family's own; the weights must have its parameters.
      preprocess: a method of `lit_fast.towers.preprocess` instead of the tower's own.
      resolution: pixels; positions are resampled by the rule of the family.
      gelu: one of `GELUS` instead of the family's own.

    Raises:
      UserError: there is no such file or name, it is no ViT, or an option does not fit it.
    """
    if resolution is not None and not 0 < resolution <= _MAX_RESOLUTION:
        raise UserError(f"resolution {resolution} is not between 1 and {_MAX_RESOLUTION} pixels")
    path = local_weights(spec)
    weights, preprocess_at = load_layout(path)
    architecture = _with_options(weights, pool, gelu, path)
    heads = {"MAPHead_0": "map", "projection": "projection"}  # parameters of one pooling only
    params = {k: v for k, v in weights.params.items() if heads.get(k) in (None, architecture.pool)}
    patch, grid = architecture.patch, math.isqrt(params["pos_embedding"].shape[1])
    _check_shapes(params, architecture, grid, path)
    published = preprocess_at(None)
    size = resolution or published.size
    if size != published.size and size % patch:
        raise UserError(f"resolution {size} is not a multiple of the tower's patch size {patch}")
    if not 0 < size // patch <= _MAX_GRID:
        raise UserError(f"{path}: {size} pixels are not between 1 and {_MAX_GRID} patches of {patch} pixels")
    positions = resample_positions(params["pos_embedding"], size // patch, weights.resampling)
    return Tower(
        name=_name(spec, path),
        source=os.path.abspath(spec) if not is_url(spec) and exists(spec) else spec,
        sha256=weights_digest(path),
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


def _name(spec: str, path: str) -> str:
    """Return the name of the directory of the features: the file's, its directory's, or the repository's."""
    if suffix(path) == ".npz":
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
            raise UserError(f"{path}: {name} is missing")
        if name not in want:
            raise UserError(f"{path}: {name} is a parameter that this ViT does not have")
        if want[name] != have[name]:
            raise UserError(f"{path}: {name} has shape {have[name]}, the ViT needs {want[name]}")
