"""Build the two towers as ONNX graphs.

The operators are those by which `lit_fast.models` computes the towers. Everything is float32. Functions take
parameters and the name of an input value, add operators to the graph and return the name of their output value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from lit_fast.models import text_tower as text
from lit_fast.models.architecture import Architecture
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import Params
from lit_fast.towers.tower import Tower
from lit_fast.train.export.onnx_graph import Graph
from lit_fast.utils.normalize import EPSILON
from lit_fast.weights.to_torch import block_at

SelectPosition = Callable[[str], str]
"""[batch, length, width] -> [batch, 1, width]: select the position that is pooled."""


@dataclass(frozen=True)
class _Scope:
    """A subtree of the parameters, with its path and the settings of the transformer.

    The graph stores a parameter under its path.
    """

    graph: Graph
    params: Params
    path: str
    heads: int = 0
    gelu: str = ""
    epsilon: float = 0.0  # of LayerNorm

    def __getitem__(self, name: str) -> _Scope:
        return self.child(name, self.params[name])

    def child(self, name: str, params: Params) -> _Scope:
        return replace(self, params=params, path=f"{self.path}/{name}")

    def weight(self, name: str) -> str:
        return self.graph.weight(f"{self.path}/{name}", self.params[name])


def text_embeddings(graph: Graph, ids: str, tower: TextTower, params: Params) -> str:
    """Add `lit_fast.models.two_towers.embed_ids`.

    int64 [batch, length] -> normalized float32 [batch, width].
    """
    p = _Scope(graph, params["txt"], "txt", tower.shape.heads, text.GELU, text.EPSILON)
    x = graph.add("Gather", p["Embed_0"].weight("embedding"), ids)
    if tower.embedding_width:
        x = _dense(p["embedding_projection"], x)
    x = graph.add("Add", x, p.weight("pos_embedding"))
    valid = None if tower.eos_id is None else _valid(graph, ids, tower.eos_id)
    mask = None if valid is None else graph.add("Unsqueeze", valid, np.array([1, 2]))
    select = _text_position(graph, tower.pooling, tower.max_length, valid)
    x = _encoder(p["Encoder_0"], x, mask, select)
    if select is not None:
        x = _squeeze(graph, x)
    elif tower.pooling == "map":
        x = _map_head(p["MAPHead_0"], x, mask)
    elif tower.pooling == "max":
        if valid is not None:
            visible = graph.add("Unsqueeze", valid, np.array([2]))
            x = graph.add("Where", visible, x, np.float32(-np.inf))
        x = graph.add("ReduceMax", x, axes=[1], keepdims=0)
    else:
        x = _mean(graph, x, valid)
    return _normalize(graph, _dense(p["head"], x) if tower.projected else x)


def image_embeddings(graph: Graph, images: str, tower: Tower, params: Params) -> str:
    """Add `Model.embed_image` of `lit_fast.inference.model`, without its rounding.

    uint8 [batch, size, size, 3] -> normalized float32 [batch, width]. Features are centred and normalized; an image
    head, if there is one, maps them, and they are normalized again.
    """
    a = tower.architecture
    p = _Scope(graph, tower.params, "vit", a.shape.heads, a.gelu, a.epsilon)
    mean, std = (np.array(v, np.float32) for v in (tower.preprocess.mean, tower.preprocess.std))
    x = graph.add("Div", graph.add("Cast", images, to=TensorProto.FLOAT), np.float32(255))
    x = graph.add("Div", graph.add("Sub", x, mean), std)
    x = _features(p, x, a)
    x = _normalize(graph, graph.add("Sub", x, graph.weight("mean", params["mean"])))
    if "img" in params:
        x = _normalize(graph, _dense(_Scope(graph, params["img"]["head"], "img/head"), x))
    return x


def _features(p: _Scope, x: str, a: Architecture) -> str:
    """Add `lit_fast.models.vit.ViT`: [batch, size, size, 3] -> [batch, width]."""
    graph, width, num_prefix = p.graph, a.shape.width, a.class_token + a.registers
    x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
    kernel = np.transpose(p.params["embedding"]["kernel"], (3, 2, 0, 1))
    kernel_name = graph.weight("vit/embedding/kernel", kernel)
    x = graph.add("Conv", x, kernel_name, p["embedding"].weight("bias"), strides=[a.patch, a.patch])
    x = graph.add("Transpose", graph.add("Reshape", x, np.array([0, width, -1])), perm=[0, 2, 1])
    x = graph.add("Add", x, p.weight("pos_embedding"))
    if num_prefix:
        names = ["cls"] * a.class_token + ["registers"] * (a.registers > 0)
        tokens = np.concatenate([p.params[name] for name in names], axis=1)
        prefix = graph.weight("vit/cls_and_registers", tokens)
        batch = graph.add("Shape", x, start=0, end=1)
        shape = graph.add("Concat", batch, np.array([num_prefix, width]), axis=0)
        x = graph.add("Concat", graph.add("Expand", prefix, shape), x, axis=1)
    if a.pre_norm:
        x = _norm(p["pre_norm"], x)
    select = _at(graph, 0) if a.pool in ("tok", "projection") else None
    x = _encoder(p["Transformer"], x, select=select)
    if a.pool in ("gap", "map") and num_prefix:
        end = np.iinfo(np.int64).max
        x = graph.add("Slice", x, np.array([num_prefix]), np.array([end]), np.array([1]))
    if a.pool == "gap":
        x = graph.add("ReduceMean", x, axes=[1], keepdims=0)
    elif a.pool == "map":
        x = _map_head(p["MAPHead_0"], x)
    else:
        x = _squeeze(graph, x)
    if a.norm_after_pool:
        x = _norm(p["pooled_norm"], x)
    return _dense(p["projection"], x) if a.pool == "projection" else x


def _encoder(p: _Scope, x: str, mask: str | None = None, select: SelectPosition | None = None) -> str:
    """Add `lit_fast.models.transformer.Encoder`, its stacked layers one by one.

    With `select` the last layer computes the selected position only.
    """
    blocks = p.params["encoderblock"]
    depth = len(blocks["LayerNorm_0"]["scale"])
    for i in range(depth):
        block = p.child(f"encoderblock_{i}", block_at(blocks, i))
        keys = queries = _norm(block["LayerNorm_0"], x)
        if select is not None and i == depth - 1:
            x, queries = select(x), select(keys)
        y = _attention(block["MultiHeadDotProductAttention_0"], queries, keys, mask)
        x = p.graph.add("Add", x, y)
        y = _mlp(block["MlpBlock_0"], _norm(block["LayerNorm_1"], x))
        x = p.graph.add("Add", x, y)
    return _norm(p["encoder_norm"], x) if "encoder_norm" in p.params else x


def _attention(p: _Scope, queries: str, keys: str, mask: str | None) -> str:
    """Add `lit_fast.models.transformer.MultiHeadDotProductAttention`."""
    graph = p.graph

    def project(part: str, x: str, perm: tuple[int, ...]) -> str:
        x = graph.add("Reshape", _dense(p[part], x), np.array([0, 0, p.heads, -1]))
        return graph.add("Transpose", x, perm=perm)

    head_width = p.params["query"]["kernel"].shape[-1]
    q = graph.add("Mul", project("query", queries, (0, 2, 1, 3)), np.float32(head_width**-0.5))
    k, v = project("key", keys, (0, 2, 3, 1)), project("value", keys, (0, 2, 1, 3))
    scores = graph.add("MatMul", q, k)
    if mask is not None:
        scores = graph.add("Where", mask, scores, np.finfo(np.float32).min)
    y = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    y = graph.add("Reshape", graph.add("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, 0, -1]))
    out = p.params["out"]
    return _dense(p.child("out", out | {"kernel": out["kernel"].reshape(p.heads * head_width, -1)}), y)


def _mlp(p: _Scope, x: str) -> str:
    graph, first = p.graph, p["Dense_0"]
    if p.gelu == "swiglu":
        half = len(p.params["Dense_1"]["kernel"])
        gate = _dense(first.child("gate", {k: v[..., :half] for k, v in first.params.items()}), x)
        value = _dense(first.child("value", {k: v[..., half:] for k, v in first.params.items()}), x)
        x = graph.add("Mul", graph.add("Mul", gate, graph.add("Sigmoid", gate)), value)
    else:
        x = _GELUS[p.gelu](graph, _dense(first, x))
    return _dense(p["Dense_1"], x)


def _map_head(p: _Scope, x: str, mask: str | None = None) -> str:
    """Add `lit_fast.models.transformer.MAPHead`."""
    x = _attention(p["MultiHeadDotProductAttention_0"], p.weight("probe"), x, mask)
    y = _mlp(p["MlpBlock_0"], _norm(p["LayerNorm_0"], x))
    return _squeeze(p.graph, p.graph.add("Add", x, y))


def _dense(p: _Scope, x: str) -> str:
    """Add `x @ kernel + bias`; output axes, heads and head width, become one."""
    kernel = np.asarray(p.params["kernel"])
    x = p.graph.add("MatMul", x, p.graph.weight(f"{p.path}/kernel", kernel.reshape(len(kernel), -1)))
    if "bias" not in p.params:
        return x
    return p.graph.add("Add", x, p.graph.weight(f"{p.path}/bias", p.params["bias"].reshape(-1)))


def _norm(p: _Scope, x: str) -> str:
    scale, bias = p.weight("scale"), p.weight("bias")
    return p.graph.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=p.epsilon)


def _normalize(graph: Graph, x: str) -> str:
    """Add `lit_fast.utils.normalize.normalize`."""
    norm = graph.add("ReduceL2", x, axes=[-1], keepdims=1)
    return graph.add("Div", x, graph.add("Add", norm, np.float32(EPSILON)))


def _valid(graph: Graph, ids: str, eos_id: int) -> str:
    """Add bool [batch, length], true up to and including the first end-of-sentence."""
    end = graph.add("Cast", graph.add("Equal", ids, np.int64(eos_id)), to=TensorProto.INT64)
    return graph.add("Equal", graph.add("CumSum", end, np.int64(1), exclusive=1), np.int64(0))


def _text_position(graph: Graph, pooling: str, length: int, valid: str | None) -> SelectPosition | None:
    """Return the selection of the pooled position, None if all are pooled."""
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
    """Add the mean over the valid positions."""
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
