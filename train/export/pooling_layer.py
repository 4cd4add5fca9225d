"""Express a text tower's pooling and padding mask as one more attention layer.

Other code bases lack them. Their text transformers take the output at one fixed position, and few can exclude padding
from a mean. Both can be expressed exactly by weights alone. In a further layer the queries of all positions are
equal, and the attention's output is the pooled vector: the mean over the visible positions (zero queries: all keys
have the same weight), or the vector of one position, whose embedding has a mark that its key amplifies. Every output
position then holds

    residual stream + GAIN * (pooled vector before the last LayerNorm's scale and bias, and a constant)

and GAIN is so large that the first term vanishes in float32. The code base's final LayerNorm divides by the standard
deviation of this, a positive factor, which normalizing the embedding removes again. The constant is scaled by the same
factor and carries the biases.

Constant and mark need dimensions of their own, which must not disturb the LayerNorms. Therefore the output of every
layer is centred, so that a LayerNorm's own subtraction does nothing, and scales and epsilon are corrected for the
zeros that the mean of squares includes.

GAIN needs the range of float32 or bfloat16; float16 overflows.
"""

from __future__ import annotations

import jax
import numpy as np

from lit_fast.errors import UserError
from lit_fast.models.text_tower import EPSILON
from lit_fast.train.export.fold import with_text_head
from lit_fast.weights.parameters import Params

GAIN = 2.0**40
# The mark adds 6e-8 of the variance that the LayerNorms at its position divide by, in each of two dimensions, and is
# amplified to a score that leaves the other positions a weight of zero. The two dimensions hold +MARK and -MARK, and
# their difference is the signal: without a mark it is exactly zero, however the LayerNorm's mean is rounded.
_MARK = 2.0**-12
_AMPLIFIED = 2.0**36
_EXTRA_PER_HEAD = 8  # additional dimensions; four in all are used


def check_pooling(pooling: str, library: str) -> None:
    """Raise UserError if one attention layer cannot express the pooling."""
    if pooling in ("max", "map"):
        raise UserError(
            f"{library} has no text tower of text.pooling {pooling!r}; export with --format lit_fast or onnx"
        )


def with_pooling_layer(txt: Params, pooling: str, eos_id: int | None) -> tuple[Params, float]:
    """Return a tower whose output at any position is the pooled one, up to scale.

    Args:
      txt: a text tower without MAP head, see `lit_fast.models.text_tower`.
      pooling: "mean", "first" or "last".
      eos_id: end-of-sentence, if the caller's code base masks padding: "last" is its position. None: nothing is
        masked, and all texts have the same length.

    Returns:
      The parameters of a pre-LN text transformer, float32 under big_vision's names, with head and stacked blocks; and
      the epsilon of its LayerNorms.
    """
    txt = with_text_head(txt)
    encoder, block = txt["Encoder_0"], txt["Encoder_0"]["encoderblock"]
    attention, mlp = block["MultiHeadDotProductAttention_0"], block["MlpBlock_0"]
    _, width, heads, head_width = attention["query"]["kernel"].shape
    wide = width + _EXTRA_PER_HEAD * heads
    wide_head = wide // heads
    mark = width + 2  # after the two dimensions of the constant
    keep = (width / wide) ** 0.5

    table = _padded(_centered(txt["Embed_0"]["embedding"]), {-1: wide})
    positions = _padded(_centered(txt["pos_embedding"]), {-1: wide})
    if pooling == "last" and eos_id is not None:
        table[eos_id, mark : mark + 2] = _MARK, -_MARK
    elif pooling != "mean":
        positions[0, 0 if pooling == "first" else -1, mark : mark + 2] = _MARK, -_MARK

    def padded_norm(norm: Params) -> Params:
        return {
            "scale": _padded(_float64(norm["scale"]) * keep, {-1: wide}),
            "bias": _padded(norm["bias"], {-1: wide}),
        }

    def padded_dense(layer: Params, kernel: dict[int, int], bias: dict[int, int]) -> Params:
        return {"kernel": _padded(layer["kernel"], kernel), "bias": _padded(layer["bias"], bias)}

    # Attention divides scores by the square root of the head width, which grows.
    query_scale = (wide_head / head_width) ** 0.5
    query = jax.tree.map(lambda array: _float64(array) * query_scale, attention["query"])
    heads_kernel, heads_bias = {1: wide, -1: wide_head}, {-1: wide_head}
    layers: Params = {
        "LayerNorm_0": padded_norm(block["LayerNorm_0"]),
        "MultiHeadDotProductAttention_0": {
            "query": padded_dense(query, heads_kernel, heads_bias),
            "key": padded_dense(attention["key"], heads_kernel, heads_bias),
            "value": padded_dense(attention["value"], heads_kernel, heads_bias),
            "out": padded_dense(
                jax.tree.map(_centered, attention["out"]), {2: wide_head, -1: wide}, {-1: wide}
            ),
        },
        "LayerNorm_1": padded_norm(block["LayerNorm_1"]),
        "MlpBlock_0": {
            "Dense_0": padded_dense(mlp["Dense_0"], {1: wide}, {}),
            "Dense_1": padded_dense(jax.tree.map(_centered, mlp["Dense_1"]), {-1: wide}, {-1: wide}),
        },
    }
    last = _pooling_layer(layers, width, keep, mark if pooling != "mean" else None)
    scale, bias = (_float64(encoder["encoder_norm"][name]) for name in ("scale", "bias"))
    kernel, head_bias = _float64(txt["head"]["kernel"]), _float64(txt["head"]["bias"])
    constant = (bias @ kernel + head_bias) / 2
    params = {
        "Embed_0": {"embedding": table},
        "pos_embedding": positions,
        "Encoder_0": {
            "encoderblock": jax.tree.map(lambda rest, one: np.concatenate([rest, one[None]]), layers, last),
            "encoder_norm": {"scale": np.ones(wide), "bias": np.zeros(wide)},
        },
        "head": {
            "kernel": _padded(np.concatenate([scale[:, None] * kernel, [constant, -constant]]), {0: wide}),
            "bias": np.zeros(kernel.shape[1]),
        },
    }
    return jax.tree.map(lambda array: array.astype(np.float32), params), EPSILON * width / wide


def _pooling_layer(layers: Params, width: int, keep: float, mark: int | None) -> Params:
    """Return a layer of the wide tower that pools; its MLP returns zero."""
    layer: Params = jax.tree.map(lambda stacked: np.zeros(stacked.shape[1:]), layers)
    attention = layer["MultiHeadDotProductAttention_0"]
    wide, heads, head_width = attention["query"]["kernel"].shape
    layer["LayerNorm_0"]["scale"][:width] = keep
    selected = np.diag(np.arange(wide) < width).astype(np.float64)
    attention["value"]["kernel"][:] = selected.reshape(wide, heads, head_width)
    attention["out"]["kernel"][:] = GAIN * selected.reshape(heads, head_width, wide)
    attention["out"]["bias"][width : width + 2] = GAIN, -GAIN
    if mark is not None:
        layer["LayerNorm_0"]["scale"][mark : mark + 2] = keep
        attention["query"]["bias"][:, 0] = 1.0
        attention["key"]["kernel"][mark : mark + 2, :, 0] = [[_AMPLIFIED], [-_AMPLIFIED]]
    return layer


def _float64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)


def _centered(array: np.ndarray) -> np.ndarray:
    """Subtract the mean along the last axis, as the next LayerNorm would."""
    array = _float64(array)
    return array - array.mean(axis=-1, keepdims=True)


def _padded(array: np.ndarray, sizes: dict[int, int]) -> np.ndarray:
    """Append zeros up to the given sizes of axes."""
    array = _float64(array)
    pads = [(0, 0)] * array.ndim
    for axis, size in sizes.items():
        pads[axis] = (0, size - array.shape[axis])
    return np.pad(array, pads)
