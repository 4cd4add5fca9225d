"""Convert a transformer's weights from PyTorch's layout to big_vision's: transposed kernels, separate heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lit_fast.weights.parameters import Params
from lit_fast.weights.reader import WeightsFile, unusable_weights


class BlockNames(NamedTuple):
    """The names that a code base gives to the parts of a block.

    Attributes:
      block: prefix before the block's number.
      norms: of attention and of the MLP.
      attention: query, key, value, out; equal names of the first three: one matrix for all.
      mlps: alternatives for the two dense layers.
      scales: alternatives for the two LayerScales; a block may have none.
    """

    block: str
    norms: tuple[str, str]
    attention: tuple[str, str, str, str]
    mlps: tuple[tuple[str, str], ...]
    scales: tuple[tuple[str, str], ...] = ()


def embedding(file: WeightsFile, name: str, bias: bool) -> Params:
    """Convert the patch embedding [width, 3, patch, patch] to a convolution kernel [patch, patch, 3, width].

    Raises:
      UserError: it is missing, or patches are not square.
    """
    kernel = file.take(f"{name}.weight", None, 3, None, None).transpose(2, 3, 1, 0)
    if kernel.shape[0] != kernel.shape[1]:
        raise unusable_weights(
            file.path, f"patches of {kernel.shape[0]} x {kernel.shape[1]} pixels are not square"
        )
    width = kernel.shape[-1]
    return {
        "kernel": np.ascontiguousarray(kernel),
        "bias": file.take(f"{name}.bias", width) if bias else np.zeros(width, np.float32),
    }


def norm(file: WeightsFile, name: str, width: int) -> Params:
    """Convert a LayerNorm."""
    return {"scale": file.take(f"{name}.weight", width), "bias": file.take(f"{name}.bias", width)}


def dense(file: WeightsFile, name: str, inputs: int | None, outputs: int | None, bias: bool = True) -> Params:
    """Convert a dense layer [outputs, inputs] to the kernel [inputs, outputs]; without bias, the bias is zeros."""
    kernel = file.take(f"{name}.weight", outputs, inputs).T
    size = kernel.shape[1]
    return {"kernel": kernel, "bias": file.take(f"{name}.bias", size) if bias else np.zeros(size, np.float32)}


def mlp(file: WeightsFile, fc1: str, fc2: str, width: int) -> Params:
    """Convert the two dense layers of an MLP."""
    return {"Dense_0": dense(file, fc1, width, None), "Dense_1": dense(file, fc2, None, width)}


def attention(query_key_value: Sequence[Params], out: Params, heads: int) -> Params:
    """Convert four dense layers [width, width] to multi-head attention with kernels [width, heads, width / heads]."""
    width = len(out["bias"])
    query, key, value = query_key_value

    def split(layer: Params) -> Params:
        return {
            "kernel": layer["kernel"].reshape(width, heads, width // heads),
            "bias": layer["bias"].reshape(heads, width // heads),
        }

    return {
        "query": split(query),
        "key": split(key),
        "value": split(value),
        "out": {"kernel": out["kernel"].reshape(heads, width // heads, width), "bias": out["bias"]},
    }


def packed(file: WeightsFile, weight: str, bias: str, parts: int, width: int) -> list[Params]:
    """Split one matrix [parts * width, width] into dense layers [width, width]; a missing bias is zeros."""
    kernels = np.split(file.take(weight, parts * width, width), parts)
    if bias in file.shapes:
        biases = np.split(file.take(bias, parts * width), parts)
    else:
        biases = [np.zeros(width, np.float32)] * parts
    return [{"kernel": k.T, "bias": b} for k, b in zip(kernels, biases, strict=True)]


def scaled(layer: Params, gamma: np.ndarray) -> Params:
    """Fold a LayerScale into the dense layer before it; rounded once, from the product in float64."""
    return {k: (layer[k].astype(np.float64) * gamma).astype(np.float32) for k in ("kernel", "bias")}


def blocks(file: WeightsFile, names: BlockNames, width: int, heads: int, qkv_bias: bool = True) -> Params:
    """Convert all blocks and stack them on a leading axis, with LayerScale folded into the layers before it.

    `heads` may be any value of a config.json.

    Raises:
      UserError: a block or a part of one is missing or has another shape, or `heads` does not divide the width.
    """
    number = re.compile(re.escape(names.block) + r"(\d{1,4})\.")
    found = {int(m[1]) for m in map(number.match, file.shapes) if m}
    if not found:
        raise unusable_weights(file.path, f"no blocks of a ViT, {names.block}0 is missing")
    if len(found) != max(found) + 1:
        missing = min(set(range(max(found))) - found)
        raise unusable_weights(file.path, f"{names.block}{missing} is missing")
    if type(heads) is not int or heads < 1 or width % heads:
        raise unusable_weights(file.path, f"a width of {width} cannot be split into {heads!r} heads")
    layers = [_block(file, names, f"{names.block}{i}.", width, heads, qkv_bias) for i in range(len(found))]

    def stack(path: jax.tree_util.KeyPath, *arrays: np.ndarray) -> np.ndarray:
        if len({array.shape for array in arrays}) > 1:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise unusable_weights(file.path, f"{name} does not have the same shape in every block")
        return np.stack(arrays)

    return jax.tree_util.tree_map_with_path(stack, *layers)


def _block(
    file: WeightsFile, names: BlockNames, prefix: str, width: int, heads: int, qkv_bias: bool
) -> Params:
    query, key, value, out = (prefix + part for part in names.attention)
    last = dense(file, out, width, width)
    if query == key:  # one matrix for the three
        separator = "_" if query.endswith("in_proj") else "."  # as torch.nn.MultiheadAttention names it
        three = packed(file, f"{query}{separator}weight", f"{query}{separator}bias", 3, width)
    else:
        three = [dense(file, part, width, width, qkv_bias) for part in (query, key, value)]
    choices = [(prefix + a, prefix + b) for a, b in names.mlps]
    fc1, fc2 = next((pair for pair in choices if f"{pair[0]}.weight" in file.shapes), choices[0])
    two = mlp(file, fc1, fc2, width)
    for pair in names.scales:
        if prefix + pair[0] in file.shapes:
            last = scaled(last, file.take(prefix + pair[0], width))
            two["Dense_1"] = scaled(two["Dense_1"], file.take(prefix + pair[1], width))
    return {
        "LayerNorm_0": norm(file, prefix + names.norms[0], width),
        "MultiHeadDotProductAttention_0": attention(three, last, heads),
        "LayerNorm_1": norm(file, prefix + names.norms[1], width),
        "MlpBlock_0": two,
    }
