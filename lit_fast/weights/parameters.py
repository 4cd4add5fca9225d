"""The result of reading a weights file: parameters under big_vision's names, and their architecture."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture
from lit_fast.models.sizes import Shape
from lit_fast.weights.reader import unusable_weights

Params = dict[str, Any]


class Weights(NamedTuple):
    """A vision tower's weights, including those of poolings that the architecture does not use.

    Attributes:
      params: float32 arrays, nested under big_vision's names; blocks are stacked on a leading axis.
      architecture: that of the family, before options of the user.
      resampling: rule of `lit_fast.weights.positions` for other resolutions.
    """

    params: Params
    architecture: Architecture
    resampling: str


def architecture_of(params: Params, gelu: str, epsilon: float, pool: str | None = None) -> Architecture:
    """Return the architecture that follows from the shapes of parameters.

    Args:
      params: nested under big_vision's names.
      gelu: see `Architecture`; SwiGLU is recognized by its shapes.
      epsilon: of LayerNorm.
      pool: see `Architecture`; by default the MAP head, else the class token, else the mean, whichever exists.

    Raises:
      KeyError, ValueError: the parameters are not those of a ViT.
    """
    block = params["Transformer"]["encoderblock"]
    patch, _, _, width = params["embedding"]["kernel"].shape
    depth, _, heads, _ = block["MultiHeadDotProductAttention_0"]["query"]["kernel"].shape
    _, mlp_dim, _ = block["MlpBlock_0"]["Dense_1"]["kernel"].shape
    if block["MlpBlock_0"]["Dense_0"]["kernel"].shape[-1] == 2 * mlp_dim:
        gelu = "swiglu"
    projection = params["projection"]["kernel"].shape[1] if "projection" in params else 0
    if pool is None:
        pool = "map" if "MAPHead_0" in params else "tok" if "cls" in params else "gap"
    if pool == "tok" and projection:
        pool = "projection"
    return Architecture(
        shape=Shape(width, depth, mlp_dim, heads),
        patch=patch,
        pool=pool,
        gelu=gelu,
        epsilon=epsilon,
        class_token="cls" in params,
        registers=params["registers"].shape[1] if "registers" in params else 0,
        pre_norm="pre_norm" in params,
        norm_after_pool="pooled_norm" in params,
        projection=projection,
    )


def nested(flat: dict[str, np.ndarray], path: str) -> Params:
    """Nest arrays by the slashes in their names; `path` is for messages.

    Raises:
      UserError: a name is that of an array and of a group of arrays.
    """
    groups = {group for name in flat for group in accumulate(name.split("/")[:-1], "{}/{}".format)}
    if both := sorted(groups & flat.keys()):
        raise unusable_weights(path, f"{both[0]} is both an array and a group of arrays")
    return unflatten_dict(flat, sep="/")


def square_grid(positions: int, path: str) -> int:
    """Return the side of a square grid of positions; `path` is for messages.

    Raises:
      UserError: the number is not a square.
    """
    side = math.isqrt(positions)
    if side < 1 or side * side != positions:
        raise UserError(
            f"{path}: {positions} positions are not a square grid; give weights with square images"
        )
    return side
