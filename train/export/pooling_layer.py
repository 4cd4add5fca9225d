"""A text tower's pooling and padding mask as one more layer of attention, for code bases that lack them.

Other text transformers take the output at one fixed position, and few can leave padding out of a mean. Both
can be had exactly from weights alone. In a further layer all positions ask the same question, whose answer is
the pooled vector: the mean over what is visible (queries of zero: all keys weigh the same), or one position,
whose embedding carries a mark that its key amplifies. Whatever position is then taken holds

    its own stream + GAIN * (pooled vector before the last LayerNorm's scale and bias, and a constant)

and GAIN is so large that float32 has no room for the first term. The code base's final LayerNorm divides by
the standard deviation of this, a positive factor, which normalising the embedding takes out again; the
constant went through the same factor and carries the biases.

Constant and mark need dimensions of their own, which must not disturb the LayerNorms: every layer's output is
centred, so that the LayerNorm's own subtraction does nothing, and scales and epsilon make up for the zeros
that the mean of squares counts as well.

GAIN needs the range of float32 or bfloat16; float16 overflows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lit_fast.models.text_tower import EPSILON
from lit_fast.weights.parameters import Params

GAIN = 2.0**40
# The mark hardly adds to the variance that its position's LayerNorms divide by (6e-8 a dimension, in two of
# them), and is amplified to a score that leaves the other positions a weight of zero. It is +MARK and -MARK, and
# their difference counts: without a mark that is exactly zero, whatever the LayerNorm's mean is rounded to.
_MARK = 2.0**-12
_AMPLIFIED = 2.0**36
_PER_HEAD = 8  # further dimensions; four in all are used


class PooledTower(NamedTuple):
    """A pre-LN text transformer whose every position ends as the pooled vector."""

    params: Params  # under big_vision's names, with head; blocks stacked
    epsilon: float  # of every LayerNorm


def plain(txt: Params) -> Params:
    """The tower with a whole token table and with a head, which is the identity if it had none."""
    txt = dict(txt)
    if "embedding_projection" in txt:
        table = _exact(txt["Embed_0"]["embedding"]) @ _exact(txt.pop("embedding_projection")["kernel"])
        txt["Embed_0"] = {"embedding": table.astype(np.float32)}
    if "head" not in txt:
        width = txt["pos_embedding"].shape[-1]
        txt["head"] = {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}
    return txt


def with_pooling_layer(txt: Params, pooling: str, end: int | None) -> PooledTower:
    """A tower whose output at any position is the pooled one, but for a positive factor.

    Args:
      txt: a text tower without MAP head, see `lit_fast.models.text_tower`.
      pooling: "mean", "first" or "last".
      end: id of end-of-sentence where padding is masked, by the caller's code base: "last" is its position.
        None: nothing is masked, and all texts have the same length.
    """
    txt = plain(txt)
    encoder, block = txt["Encoder_0"], txt["Encoder_0"]["encoderblock"]
    attention = block["MultiHeadDotProductAttention_0"]
    _, width, heads, size = attention["query"]["kernel"].shape
    wide = width + _PER_HEAD * heads
    mark = width + 2  # behind the two dimensions of the constant
    keep = (width / wide) ** 0.5

    table = _widened(_centered(txt["Embed_0"]["embedding"]), {-1: wide})
    positions = _widened(_centered(txt["pos_embedding"]), {-1: wide})
    if pooling == "last" and end is not None:
        table[end, mark : mark + 2] = _MARK, -_MARK
    elif pooling != "mean":
        positions[0, 0 if pooling == "first" else -1, mark : mark + 2] = _MARK, -_MARK

    def widened_norm(norm: Params) -> Params:
        return {
            "scale": _widened(_exact(norm["scale"]) * keep, {-1: wide}),
            "bias": _widened(norm["bias"], {-1: wide}),
        }

    def widened_heads(part: Params, factor: float = 1.0) -> Params:
        size_now = wide // heads
        return {
            "kernel": _widened(_exact(part["kernel"]) * factor, {1: wide, -1: size_now}),
            "bias": _widened(_exact(part["bias"]) * factor, {-1: size_now}),
        }

    layers: Params = {
        "LayerNorm_0": widened_norm(block["LayerNorm_0"]),
        "MultiHeadDotProductAttention_0": {
            "query": widened_heads(
                attention["query"], (wide / heads / size) ** 0.5
            ),  # by which scores shrink
            "key": widened_heads(attention["key"]),
            "value": widened_heads(attention["value"]),
            "out": {
                "kernel": _widened(_centered(attention["out"]["kernel"]), {2: wide // heads, -1: wide}),
                "bias": _widened(_centered(attention["out"]["bias"]), {-1: wide}),
            },
        },
        "LayerNorm_1": widened_norm(block["LayerNorm_1"]),
        "MlpBlock_0": {
            "Dense_0": {
                "kernel": _widened(block["MlpBlock_0"]["Dense_0"]["kernel"], {1: wide}),
                "bias": _exact(block["MlpBlock_0"]["Dense_0"]["bias"]),
            },
            "Dense_1": {
                "kernel": _widened(_centered(block["MlpBlock_0"]["Dense_1"]["kernel"]), {-1: wide}),
                "bias": _widened(_centered(block["MlpBlock_0"]["Dense_1"]["bias"]), {-1: wide}),
            },
        },
    }
    last = _pooling_layer(layers, width, keep, mark if pooling != "mean" else None)
    scale, bias = (_exact(encoder["encoder_norm"][name]) for name in ("scale", "bias"))
    kernel, head_bias = _exact(txt["head"]["kernel"]), _exact(txt["head"]["bias"])
    constant = (bias @ kernel + head_bias) / 2
    params = {
        "Embed_0": {"embedding": table},
        "pos_embedding": positions,
        "Encoder_0": {
            "encoderblock": _joined(layers, last),
            "encoder_norm": {"scale": np.ones(wide), "bias": np.zeros(wide)},
        },
        "head": {
            "kernel": _widened(np.concatenate([scale[:, None] * kernel, [constant, -constant]]), {0: wide}),
            "bias": np.zeros(kernel.shape[1]),
        },
    }
    return PooledTower(_float32(params), EPSILON * width / wide)


def _pooling_layer(layers: Params, width: int, keep: float, mark: int | None) -> Params:
    """One layer of the wide tower whose attention pools and whose MLP does nothing."""
    last = _zeros(layers)
    attention = last["MultiHeadDotProductAttention_0"]
    wide, heads, size = attention["query"]["kernel"].shape
    last["LayerNorm_0"]["scale"][:width] = keep
    taken = np.diag(np.arange(wide) < width).astype(np.float64)
    attention["value"]["kernel"][:] = taken.reshape(wide, heads, size)
    attention["out"]["kernel"][:] = GAIN * taken.reshape(heads, size, wide)
    attention["out"]["bias"][width : width + 2] = GAIN, -GAIN
    if mark is not None:
        last["LayerNorm_0"]["scale"][mark : mark + 2] = keep
        attention["query"]["bias"][:, 0] = 1.0
        attention["key"]["kernel"][mark : mark + 2, :, 0] = [[_AMPLIFIED], [-_AMPLIFIED]]
    return last


def _exact(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)


def _centered(array: np.ndarray) -> np.ndarray:
    """Without the mean along the last axis, which the next LayerNorm would subtract."""
    array = _exact(array)
    return array - array.mean(axis=-1, keepdims=True)


def _widened(array: np.ndarray, sizes: dict[int, int]) -> np.ndarray:
    """With zeros up to the given sizes of its axes."""
    array = _exact(array)
    pads = [(0, 0)] * array.ndim
    for axis, size in sizes.items():
        pads[axis] = (0, size - array.shape[axis])
    return np.pad(array, pads)


def _zeros(layers: Any) -> Any:
    if isinstance(layers, dict):
        return {name: _zeros(value) for name, value in layers.items()}
    return np.zeros(layers.shape[1:])


def _joined(layers: Any, last: Any) -> Any:
    if isinstance(layers, dict):
        return {name: _joined(layers[name], last[name]) for name in layers}
    return np.concatenate([layers, last[None]])


def _float32(params: Any) -> Any:
    if isinstance(params, dict):
        return {name: _float32(value) for name, value in params.items()}
    return params.astype(np.float32)
