"""From big_vision's layout of a transformer's weights to PyTorch's: the inverse of lit_fast.weights.from_torch.

Every function returns float32 arrays by their names in the other code base.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_fast.weights.from_torch import BlockNames

Tensors = dict[str, np.ndarray]


def norm(name: str, params: Any) -> Tensors:
    """A LayerNorm."""
    return {f"{name}.weight": params["scale"], f"{name}.bias": params["bias"]}


def dense(name: str, params: Any) -> Tensors:
    """A dense layer; as [outputs, inputs]."""
    return {f"{name}.weight": params["kernel"].T, f"{name}.bias": params["bias"]}


def patches(name: str, params: Any) -> Tensors:
    """The patch embedding's kernel as [width, 3, patch, patch], without its bias."""
    return {f"{name}.weight": params["kernel"].transpose(3, 2, 0, 1)}


def attention(names: tuple[str, str, str, str], params: Any) -> Tensors:
    """Multi-head attention; query, key and value under one name are one matrix."""
    width = params["out"]["bias"].shape[0]
    three = [
        {"kernel": params[part]["kernel"].reshape(width, -1), "bias": params[part]["bias"].reshape(-1)}
        for part in ("query", "key", "value")
    ]
    out = {"kernel": params["out"]["kernel"].reshape(-1, width), "bias": params["out"]["bias"]}
    tensors = dense(names[3], out)
    if names[0] == names[1]:
        whole = {
            "kernel": np.concatenate([p["kernel"] for p in three], axis=1),
            "bias": np.concatenate([p["bias"] for p in three]),
        }
        return tensors | dense(names[0], whole)
    for name, part in zip(names, three, strict=False):
        tensors |= dense(name, part)
    return tensors


def mlp(names: tuple[str, str], params: Any) -> Tensors:
    """Two dense layers."""
    return dense(names[0], params["Dense_0"]) | dense(names[1], params["Dense_1"])


def blocks(names: BlockNames, params: Any) -> Tensors:
    """All blocks, which are stacked on a leading axis."""
    tensors: Tensors = {}
    for i in range(len(params["LayerNorm_0"]["scale"])):
        prefix, block = f"{names.block}{i}.", _at(params, i)
        query, key, value, out = (prefix + part for part in names.attention)
        fc1, fc2 = (prefix + part for part in names.mlps[0])
        tensors |= norm(prefix + names.norms[0], block["LayerNorm_0"])
        tensors |= attention((query, key, value, out), block["MultiHeadDotProductAttention_0"])
        tensors |= norm(prefix + names.norms[1], block["LayerNorm_1"])
        tensors |= mlp((fc1, fc2), block["MlpBlock_0"])
    return tensors


def contiguous(tensors: Tensors, prefix: str = "") -> Tensors:
    """Under `prefix`, as safetensors stores them."""
    return {prefix + name: np.asarray(a, np.float32, order="C") for name, a in tensors.items()}


def _at(params: Any, index: int) -> Any:
    if isinstance(params, dict):
        return {name: _at(value, index) for name, value in params.items()}
    return params[index]
