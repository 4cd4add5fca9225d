"""Build the two towers as ONNX graphs, operator by operator as `lit_fast.models` computes them.

Everything is float32. Functions take the graph, the name of their input value and their parameters, and return the
name of their output value. `name` is the path of the parameters, by which the file stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from lit_fast.models import text_tower as text
from lit_fast.models.architecture import Architecture
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import Params
from lit_fast.towers.tower import Tower
from lit_fast.train.export.onnx_graph import Graph
from lit_fast.utils.normalize import EPSILON
from lit_fast.weights.to_torch import block_at

SelectPosition = Callable[[str], str]
"""[batch, length, width] -> [batch, 1, width]: select the position that is pooled."""

_ATTENTION = "MultiHeadDotProductAttention_0"


def text_embeddings(graph: Graph, ids: str, tower: TextTower, params: Params) -> str:
    """int64 [batch, length] -> normalised float32 [batch, width] (`lit_fast.models.two_towers.embed_ids`)."""
    p = params["txt"]
    x = graph.add("Gather", graph.weight("txt/Embed_0/embedding", p["Embed_0"]["embedding"]), ids)
    if tower.embedding_width:
        x = _dense(graph, x, p["embedding_projection"], "txt/embedding_projection")
    x = graph.add("Add", x, graph.weight("txt/pos_embedding", p["pos_embedding"]))
    valid = None if tower.eos_id is None else _valid(graph, ids, tower.eos_id)
    mask = None if valid is None else graph.add("Unsqueeze", valid, np.array([1, 2]))
    select = _text_position(graph, tower.pooling, tower.max_length, valid)
    x = _encoder(
        graph, x, p["Encoder_0"], "txt/Encoder_0", tower.shape, text.GELU, text.EPSILON, mask=mask, select=select
    )  # fmt: skip
    if select is not None:
        x = _squeeze(graph, x)
    elif tower.pooling == "map":
        x = _map_head(
            graph, x, p["MAPHead_0"], "txt/MAPHead_0", tower.shape, text.GELU, text.EPSILON, mask=mask
        )
    elif tower.pooling == "max":
        if valid is not None:
            visible = graph.add("Unsqueeze", valid, np.array([2]))
            x = graph.add("Where", visible, x, np.float32(-np.inf))
        x = graph.add("ReduceMax", x, axes=[1], keepdims=0)
    else:
        x = _mean(graph, x, valid)
    return _normalize(graph, _dense(graph, x, p["head"], "txt/head") if tower.projected else x)


def image_embeddings(graph: Graph, images: str, tower: Tower, params: Params) -> str:
    """uint8 [batch, size, size, 3] -> normalised float32 [batch, width].

    Features are centred and normalised; an image head, if there is one, maps them, and they are normalised again.
    """
    x = _features(graph, images, tower)
    x = _normalize(graph, graph.add("Sub", x, graph.weight("mean", params["mean"])))
    if "img" in params:
        x = _normalize(graph, _dense(graph, x, params["img"]["head"], "img/head"))
    return x


def _features(graph: Graph, images: str, tower: Tower) -> str:
    a, p = tower.architecture, tower.params
    width, num_prefix = a.shape.width, a.class_token + a.registers
    mean, std = (np.array(v, np.float32) for v in (tower.preprocess.mean, tower.preprocess.std))
    x = graph.add("Div", graph.add("Cast", images, to=TensorProto.FLOAT), np.float32(255))
    x = graph.add("Transpose", graph.add("Div", graph.add("Sub", x, mean), std), perm=[0, 3, 1, 2])
    kernel = graph.weight("vit/embedding/kernel", np.transpose(p["embedding"]["kernel"], (3, 2, 0, 1)))
    bias = graph.weight("vit/embedding/bias", p["embedding"]["bias"])
    x = graph.add("Conv", x, kernel, bias, strides=[a.patch, a.patch])
    x = graph.add("Transpose", graph.add("Reshape", x, np.array([0, width, -1])), perm=[0, 2, 1])
    x = graph.add("Add", x, graph.weight("vit/pos_embedding", p["pos_embedding"]))
    if num_prefix:
        prefix = [
            p[name] for name, present in (("cls", a.class_token), ("registers", a.registers)) if present
        ]
        tokens = graph.weight("vit/cls_and_registers", np.concatenate(prefix, axis=1))
        batch = graph.add("Shape", x, start=0, end=1)
        tokens = graph.add(
            "Expand", tokens, graph.add("Concat", batch, np.array([num_prefix, width]), axis=0)
        )
        x = graph.add("Concat", tokens, x, axis=1)
    if a.pre_norm:
        x = _norm(graph, x, p["pre_norm"], "vit/pre_norm", a.epsilon)
    x = _encoder(
        graph, x, p["Transformer"], "vit/Transformer", a.shape, a.gelu, a.epsilon,
        select=_at(graph, 0) if a.pool in ("tok", "projection") else None,
    )  # fmt: skip
    return _pooled(graph, x, a, p, num_prefix)


def _pooled(graph: Graph, x: str, a: Architecture, p: Params, num_prefix: int) -> str:
    if a.pool in ("gap", "map") and num_prefix:
        x = graph.add("Slice", x, np.array([num_prefix]), np.array([np.iinfo(np.int64).max]), np.array([1]))
    if a.pool == "gap":
        x = graph.add("ReduceMean", x, axes=[1], keepdims=0)
    elif a.pool == "map":
        x = _map_head(graph, x, p["MAPHead_0"], "vit/MAPHead_0", a.shape, a.gelu, a.epsilon)
    else:
        x = _squeeze(graph, x)
    if a.norm_after_pool:
        x = _norm(graph, x, p["pooled_norm"], "vit/pooled_norm", a.epsilon)
    return _dense(graph, x, p["projection"], "vit/projection") if a.pool == "projection" else x


def _encoder(
    graph: Graph,
    x: str,
    p: Params,
    name: str,
    shape: Shape,
    gelu: str,
    epsilon: float,
    mask: str | None = None,
    select: SelectPosition | None = None,
) -> str:
    """Add `lit_fast.models.transformer.Encoder`, its stacked layers one by one.

    With `select` the last layer computes the selected position only.
    """
    for i in range(shape.depth):
        block, prefix = block_at(p["encoderblock"], i), f"{name}/encoderblock_{i}"
        keys = queries = _norm(graph, x, block["LayerNorm_0"], f"{prefix}/LayerNorm_0", epsilon)
        if select is not None and i == shape.depth - 1:
            x, queries = select(x), select(keys)
        y = _attention(graph, queries, keys, block[_ATTENTION], f"{prefix}/{_ATTENTION}", shape.heads, mask)
        x = graph.add("Add", x, y)
        y = _norm(graph, x, block["LayerNorm_1"], f"{prefix}/LayerNorm_1", epsilon)
        x = graph.add("Add", x, _mlp(graph, y, block["MlpBlock_0"], f"{prefix}/MlpBlock_0", gelu))
    if "encoder_norm" in p:
        x = _norm(graph, x, p["encoder_norm"], f"{name}/encoder_norm", epsilon)
    return x


def _attention(
    graph: Graph, queries: str, keys: str, p: Params, name: str, heads: int, mask: str | None
) -> str:
    """Add `lit_fast.models.transformer.MultiHeadDotProductAttention`."""

    def project(part: str, x: str, perm: tuple[int, ...]) -> str:
        x = _dense(graph, x, p[part], f"{name}/{part}")
        return graph.add("Transpose", graph.add("Reshape", x, np.array([0, 0, heads, -1])), perm=perm)

    size = p["query"]["kernel"].shape[-1]
    q = graph.add("Mul", project("query", queries, (0, 2, 1, 3)), np.float32(size**-0.5))
    k, v = project("key", keys, (0, 2, 3, 1)), project("value", keys, (0, 2, 1, 3))
    scores = graph.add("MatMul", q, k)
    if mask is not None:
        scores = graph.add("Where", mask, scores, np.finfo(np.float32).min)
    y = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    y = graph.add("Reshape", graph.add("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))
    out = {"kernel": p["out"]["kernel"].reshape(heads * size, -1), "bias": p["out"]["bias"]}
    return _dense(graph, y, out, f"{name}/out")


def _mlp(graph: Graph, x: str, p: Params, name: str, gelu: str) -> str:
    first = p["Dense_0"]
    if gelu == "swiglu":
        half = p["Dense_1"]["kernel"].shape[0]
        gate = _dense(graph, x, {key: v[..., :half] for key, v in first.items()}, f"{name}/Dense_0/gate")
        value = _dense(graph, x, {key: v[..., half:] for key, v in first.items()}, f"{name}/Dense_0/value")
        x = graph.add("Mul", graph.add("Mul", gate, graph.add("Sigmoid", gate)), value)
    else:
        x = _GELUS[gelu](graph, _dense(graph, x, first, f"{name}/Dense_0"))
    return _dense(graph, x, p["Dense_1"], f"{name}/Dense_1")


def _map_head(
    graph: Graph,
    x: str,
    p: Params,
    name: str,
    shape: Shape,
    gelu: str,
    epsilon: float,
    mask: str | None = None,
) -> str:
    """Add `lit_fast.models.transformer.MAPHead`; its learned query is broadcast over the batch."""
    probe = graph.weight(f"{name}/probe", p["probe"])
    x = _attention(graph, probe, x, p[_ATTENTION], f"{name}/{_ATTENTION}", shape.heads, mask)
    y = _norm(graph, x, p["LayerNorm_0"], f"{name}/LayerNorm_0", epsilon)
    return _squeeze(graph, graph.add("Add", x, _mlp(graph, y, p["MlpBlock_0"], f"{name}/MlpBlock_0", gelu)))


def _dense(graph: Graph, x: str, p: Params, name: str) -> str:
    """Add `x @ kernel + bias`; the kernel's output axes, heads and head width, become one."""
    kernel = np.asarray(p["kernel"])
    x = graph.add("MatMul", x, graph.weight(f"{name}/kernel", kernel.reshape(kernel.shape[0], -1)))
    return graph.add("Add", x, graph.weight(f"{name}/bias", p["bias"].reshape(-1))) if "bias" in p else x


def _norm(graph: Graph, x: str, p: Params, name: str, epsilon: float) -> str:
    scale, bias = (graph.weight(f"{name}/{leaf}", p[leaf]) for leaf in ("scale", "bias"))
    return graph.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def _normalize(graph: Graph, x: str) -> str:
    """Add `lit_fast.utils.normalize.normalize`."""
    norm = graph.add("ReduceL2", x, axes=[-1], keepdims=1)
    return graph.add("Div", x, graph.add("Add", norm, np.float32(EPSILON)))


def _valid(graph: Graph, ids: str, eos_id: int) -> str:
    """Add bool [batch, length], true up to and including the first end-of-sentence."""
    end = graph.add("Cast", graph.add("Equal", ids, np.int64(eos_id)), to=TensorProto.INT64)
    return graph.add("Equal", graph.add("CumSum", end, np.int64(1), exclusive=1), np.int64(0))


def _text_position(graph: Graph, pooling: str, length: int, valid: str | None) -> SelectPosition | None:
    """Return the selection of the pooled position, None if the pooling uses all positions."""
    if pooling == "first":
        return _at(graph, 0)
    if pooling != "last":
        return None
    if valid is None:
        return _at(graph, length - 1)
    count = graph.add("ReduceSum", graph.add("Cast", valid, to=TensorProto.INT64), np.array([1]), keepdims=1)
    index = graph.add("Unsqueeze", graph.add("Sub", count, np.int64(1)), np.array([2]))
    return lambda x: graph.add("GatherND", x, index, batch_dims=1)


def _at(graph: Graph, position: int) -> SelectPosition:
    return lambda x: graph.add("Gather", x, np.array([position]), axis=1)


def _squeeze(graph: Graph, x: str) -> str:
    return graph.add("Squeeze", x, np.array([1]))


def _mean(graph: Graph, x: str, valid: str | None) -> str:
    if valid is None:
        return graph.add("ReduceMean", x, axes=[1], keepdims=0)
    weight = graph.add("Cast", valid, to=TensorProto.FLOAT)
    weight = graph.add("Div", weight, graph.add("ReduceSum", weight, np.array([1]), keepdims=1))
    return _squeeze(graph, graph.add("MatMul", graph.add("Unsqueeze", weight, np.array([1])), x))


def _gelu_exact(graph: Graph, x: str) -> str:
    y = graph.add("Add", graph.add("Erf", graph.add("Div", x, np.float32(math.sqrt(2)))), np.float32(1))
    return graph.add("Mul", graph.add("Mul", x, y), np.float32(0.5))


def _gelu_tanh(graph: Graph, x: str) -> str:
    cube = graph.add("Mul", graph.add("Mul", x, x), x)
    y = graph.add("Add", x, graph.add("Mul", cube, np.float32(0.044715)))
    y = graph.add("Tanh", graph.add("Mul", y, np.float32(math.sqrt(2 / math.pi))))
    return graph.add("Mul", graph.add("Mul", x, np.float32(0.5)), graph.add("Add", y, np.float32(1)))


def _gelu_quick(graph: Graph, x: str) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", graph.add("Mul", x, np.float32(1.702))))


_GELUS: dict[str, Callable[[Graph, str], str]] = {
    "exact": _gelu_exact,
    "tanh": _gelu_tanh,
    "quick": _gelu_quick,
}
