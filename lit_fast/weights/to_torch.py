"""Convert a transformer's parameters to PyTorch's layout.

The inverse is `lit_fast.weights.from_torch`. Parameters are nested dicts under big_vision's names; functions return
arrays by the names of the other code base.
"""

from __future__ import annotations

import jax
import numpy as np

from lit_fast.weights.from_torch import BlockNames
from lit_fast.weights.parameters import Params

Tensors = dict[str, np.ndarray]


def norm(name: str, params: Params) -> Tensors:
    """Convert a LayerNorm."""
    return {f"{name}.weight": params["scale"], f"{name}.bias": params["bias"]}


def dense(name: str, params: Params) -> Tensors:
    """Convert a dense layer; its weight becomes [outputs, inputs].

    A layer called `in_proj` gets the names of torch.nn.MultiheadAttention, `in_proj_weight` and `in_proj_bias`.
    """
    separator = "_" if name.endswith("in_proj") else "."
    return {f"{name}{separator}weight": params["kernel"].T, f"{name}{separator}bias": params["bias"]}


def embedding(name: str, params: Params) -> Tensors:
    """Convert a patch embedding's kernel to [width, 3, patch, patch]."""
    return {f"{name}.weight": params["kernel"].transpose(3, 2, 0, 1)}


def attention(names: tuple[str, str, str, str], params: Params) -> Tensors:
    """Convert multi-head attention.

    Args:
      names: of query, key, value and output; projections of the same name are concatenated into one matrix.
      params: kernels [width, heads, head width], and [heads, head width, width] of the output.
    """
    width = len(params["out"]["bias"])
    projections = dict(zip(("query", "key", "value"), names, strict=False))
    tensors = dense(names[3], params["out"] | {"kernel": params["out"]["kernel"].reshape(-1, width)})
    for name in dict.fromkeys(names[:3]):
        parts = [params[part] for part, part_name in projections.items() if part_name == name]
        kernel = np.concatenate([part["kernel"].reshape(width, -1) for part in parts], axis=1)
        bias = np.concatenate([part["bias"].reshape(-1) for part in parts])
        tensors |= dense(name, {"kernel": kernel, "bias": bias})
    return tensors


def mlp(names: tuple[str, str], params: Params) -> Tensors:
    """Convert the two dense layers of an MLP."""
    return dense(names[0], params["Dense_0"]) | dense(names[1], params["Dense_1"])


def blocks(names: BlockNames, params: Params, *, layer_scale: bool = False) -> Tensors:
    """Convert blocks that are stacked on a leading axis.

    Args:
      names: of the other code base.
      params: the stacked blocks.
      layer_scale: add LayerScale's weights, which are ones: the scales are folded into the layers before them.
    """
    tensors: Tensors = {}
    depth, width = params["LayerNorm_0"]["scale"].shape
    for i in range(depth):
        prefix, block = f"{names.block}{i}.", block_at(params, i)
        query, key, value, out = (prefix + part for part in names.attention)
        fc1, fc2 = (prefix + part for part in names.mlps[0])
        tensors |= norm(prefix + names.norms[0], block["LayerNorm_0"])
        tensors |= attention((query, key, value, out), block["MultiHeadDotProductAttention_0"])
        tensors |= norm(prefix + names.norms[1], block["LayerNorm_1"])
        tensors |= mlp((fc1, fc2), block["MlpBlock_0"])
        if layer_scale:
            tensors |= {prefix + scale: np.ones(width, np.float32) for scale in names.scales[0]}
    return tensors


def block_at(params: Params, index: int) -> Params:
    """Return one of the blocks that are stacked on a leading axis."""
    return jax.tree.map(lambda array: np.asarray(array)[index], params)


def contiguous(tensors: Tensors, prefix: str = "") -> Tensors:
    """Make arrays contiguous float32, as safetensors needs them; prefix their names."""
    return {prefix + name: np.asarray(a, np.float32, order="C") for name, a in tensors.items()}
