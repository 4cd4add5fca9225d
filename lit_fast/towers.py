"""Towers: frozen vision models with everything that decides their features.

A tower is weights + architecture + preprocessing + pooling. `provenance` writes that down, and its
`identity` is a digest over all of it, so that two stores with one identity hold the same features.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import lit_fast
from lit_fast.augreg import Params, read_npz, resample_positions, vit_params
from lit_fast.errors import UserError
from lit_fast.files import sha256
from lit_fast.preprocess import Preprocess
from lit_fast.variants import Shape
from lit_fast.vit import ViT

GELUS = ("exact", "tanh")


@dataclass(frozen=True)
class Tower:
    """A frozen vision tower, ready to embed."""

    name: str  # default name of the feature directory
    source: str  # file the weights came from
    sha256: str
    shape: Shape
    patch: int
    pool: str
    gelu: str
    epsilon: float
    preprocess: Preprocess
    params: Params  # float32 numpy arrays

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return self.shape.width

    def embed(self, params: Params, images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Features of uint8 images [n, size, size, 3] as float32 [n, width]; pure, for jit.

        `dtype` is the precision of the matrix products; LayerNorm statistics and softmax are float32.
        """
        mean, std = (np.asarray(v, np.float32) for v in (self.preprocess.mean, self.preprocess.std))
        x = (images.astype(jnp.float32) / 255.0 - mean) / std
        model = ViT(self.shape, self.patch, self.pool, self.gelu, self.epsilon, dtype)
        precision = "highest" if dtype == jnp.float32 else "default"
        with jax.default_matmul_precision(precision):  # float32 means float32 on accelerators too
            return model.apply({"params": params}, x)  # type: ignore[return-value]

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "architecture": "vit",
            **self.shape._asdict(),
            "patch": self.patch,
            "pool": self.pool,
            "gelu": self.gelu,
            "layer_norm_epsilon": self.epsilon,
            "preprocess": self.preprocess.to_dict(),
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
            "versions": {"lit_fast": lit_fast.__version__, "jax": jax.__version__},
        }


def load_tower(
    spec: str,
    *,
    preprocess: str | None = None,
    resolution: int | None = None,
    gelu: str | None = None,
) -> Tower:
    """Load a ViT from a local AugReg or big_vision `.npz`, with or without head, of any size.

    Defaults are timm's for these weights: bicubic resize and centre crop (fraction 0.9, from 384 pixels
    on 1.0), mean = std = 0.5, exact GELU, LayerNorm epsilon 1e-6. `preprocess` is "pil-crop" or
    "tf-squash"; `resolution` resamples the positions; `gelu="tanh"` is the function that the weights were
    trained with in JAX.

    Raises:
      UserError: no such file, not a ViT, or an option that does not fit it.
    """
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"tower {spec} is not a file; give the path of an AugReg or big_vision .npz")
    if path.suffix != ".npz":
        raise UserError(
            f"tower {spec}: only .npz weights can be read, not {path.suffix or 'a file without suffix'}"
        )
    if gelu is not None and gelu not in GELUS:
        raise UserError(f"gelu must be one of {', '.join(GELUS)}, not {gelu!r}")
    params = vit_params(read_npz(path), path)
    kernel = params["embedding"]["kernel"]
    patch, width = int(kernel.shape[0]), int(kernel.shape[-1])
    shape = _encoder_shape(params, width, path)
    native = patch * round(math.sqrt(params["pos_embedding"].shape[1]))
    size = resolution or native
    if size % patch:
        raise UserError(f"resolution {size} is not a multiple of the tower's patch size {patch}")
    params["pos_embedding"] = resample_positions(params["pos_embedding"], size // patch)
    fraction = 1.0 if size >= 384 else 0.9
    tower = Tower(
        name=path.stem,
        source=str(path.resolve()),
        sha256=sha256(path),
        shape=shape,
        patch=patch,
        pool="tok" if "cls" in params else "gap",
        gelu=gelu or "exact",
        epsilon=1e-6,
        preprocess=Preprocess(preprocess or "pil-crop", size, math.floor(size / fraction)),
        params=params,
    )
    _check_shapes(tower, path)
    return tower


def _encoder_shape(params: Params, width: int, path: Path) -> Shape:
    try:
        block = params["Transformer"]["encoderblock"]
        depth, _, heads, _ = block["MultiHeadDotProductAttention_0"]["query"]["kernel"].shape
        mlp_dim = block["MlpBlock_0"]["Dense_0"]["kernel"].shape[-1]
    except (KeyError, ValueError):
        raise UserError(f"{path} does not hold the encoder blocks of a ViT") from None
    return Shape(width, int(depth), int(mlp_dim), int(heads))


def _check_shapes(tower: Tower, path: Path) -> None:
    """Every parameter of the model must be in the file, in the right shape, and nothing else."""
    size = tower.preprocess.size
    model = ViT(tower.shape, tower.patch, tower.pool, tower.gelu, tower.epsilon)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    want = {k: v.shape for k, v in flatten_dict(wanted, sep="/").items()}
    have = {k: v.shape for k, v in flatten_dict(tower.params, sep="/").items()}
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise UserError(f"{path}: {name} has shape {have.get(name)}, the ViT needs {want.get(name)}")
