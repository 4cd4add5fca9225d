"""A transformer encoder in float64 NumPy, written from the definition and not from lit_fast's code."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import erf


def _norm(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    variance = x.var(axis=-1, keepdims=True)
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def _gelu(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "exact":
        return 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attention(queries: np.ndarray, keys: np.ndarray, p: Any, mask: np.ndarray | None) -> np.ndarray:
    def project(x: np.ndarray, name: str) -> np.ndarray:
        return np.tensordot(x, p[name]["kernel"], 1) + p[name]["bias"]  # [n, l, heads, head_dim]

    q, k, v = project(queries, "query"), project(keys, "key"), project(keys, "value")
    score = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        score = np.where(mask[:, None, None, :], score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    mixed = np.einsum("nhqk,nkhd->nqhd", weight, v)
    return np.tensordot(mixed, p["out"]["kernel"], 2) + p["out"]["bias"]


def encoder(x: np.ndarray, params: Any, gelu: str, mask: np.ndarray | None = None) -> np.ndarray:
    """Apply a pre-LN encoder with a final LayerNorm; block parameters are stacked on a leading axis."""
    blocks = params["encoderblock"]
    depth = len(blocks["LayerNorm_0"]["scale"])
    for i in range(depth):
        p = _layer(blocks, i)
        y = _norm(x, p["LayerNorm_0"])
        x = x + _attention(y, y, p["MultiHeadDotProductAttention_0"], mask)
        x = x + _mlp(_norm(x, p["LayerNorm_1"]), p["MlpBlock_0"], gelu)
    return _norm(x, params["encoder_norm"])


def _mlp(x: np.ndarray, p: Any, gelu: str) -> np.ndarray:
    hidden = _gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], gelu)
    return hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def text_tower(ids: np.ndarray, params: Any, pooling: str, mask: np.ndarray | None = None) -> np.ndarray:
    """Embed ids [n, length] with nested float64 parameters under big_vision's names, blocks stacked.

    mask: bool [n, length], true up to the end-of-sentence; None: attend to padding as well.
    """
    x = params["Embed_0"]["embedding"][ids]
    if "embedding_projection" in params:
        x = x @ params["embedding_projection"]["kernel"]
    x = encoder(x + params["pos_embedding"], params["Encoder_0"], "tanh", mask)
    rows = [x[i] if mask is None else x[i][mask[i]] for i in range(len(x))]  # the tokens to pool
    if pooling == "map":
        p = params["MAPHead_0"]
        probe = np.repeat(p["probe"], len(x), axis=0)
        y = _attention(probe, x, p["MultiHeadDotProductAttention_0"], mask)
        x = (y + _mlp(_norm(y, p["LayerNorm_0"]), p["MlpBlock_0"], "tanh"))[:, 0]
    else:
        pools = {
            "last": lambda row: row[-1],
            "first": lambda row: row[0],
            "mean": lambda row: row.mean(axis=0),
            "max": lambda row: row.max(axis=0),
        }
        x = np.stack([pools[pooling](row) for row in rows])
    return x @ params["head"]["kernel"] + params["head"]["bias"] if "head" in params else x


def _layer(tree: Any, i: int) -> Any:
    if isinstance(tree, dict):
        return {k: _layer(v, i) for k, v in tree.items()}
    return np.float64(tree[i])


def augreg_vit(images: np.ndarray, arrays: dict[str, np.ndarray], gelu: str) -> np.ndarray:
    """Compute class-token features of normalized images [n, s, s, 3] from the arrays of an AugReg file."""
    kernel = np.float64(arrays["embedding/kernel"])
    patch = kernel.shape[0]
    n, size = len(images), images.shape[1]
    side = size // patch
    patches = images.reshape(n, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(n, side * side, -1) @ kernel.reshape(-1, kernel.shape[-1]) + arrays["embedding/bias"]
    x = np.concatenate([np.repeat(np.float64(arrays["cls"]), n, axis=0), x], axis=1)
    x = x + arrays["Transformer/posembed_input/pos_embedding"]
    depth = 1 + max(int(k.split("encoderblock_")[1].split("/")[0]) for k in arrays if "encoderblock_" in k)

    def stacked(name: str) -> np.ndarray:
        return np.stack([arrays[f"Transformer/encoderblock_{i}/{name}"] for i in range(depth)])

    def pair(name: str, *leaves: str) -> dict[str, np.ndarray]:
        return {leaf: stacked(f"{name}/{leaf}") for leaf in leaves}

    attention = {
        part: pair(f"MultiHeadDotProductAttention_1/{part}", "kernel", "bias")
        for part in ("query", "key", "value", "out")
    }
    blocks = {
        "LayerNorm_0": pair("LayerNorm_0", "scale", "bias"),
        "LayerNorm_1": pair("LayerNorm_2", "scale", "bias"),
        "MultiHeadDotProductAttention_0": attention,
        "MlpBlock_0": {d: pair(f"MlpBlock_3/{d}", "kernel", "bias") for d in ("Dense_0", "Dense_1")},
    }
    norm = {leaf: np.float64(arrays[f"Transformer/encoder_norm/{leaf}"]) for leaf in ("scale", "bias")}
    return encoder(x, {"encoderblock": blocks, "encoder_norm": norm}, gelu)[:, 0]


def torch_vit(
    images: np.ndarray, weights: dict[str, np.ndarray], heads: int, gelu: str, epsilon: float, pool: str
) -> np.ndarray:
    """Compute features of normalized images [n, s, s, 3] from weights under timm's names, as [out, in] matrices.

    Query, key and value are separate (`attn.q`, ...). The weights decide which parts exist: class token, further
    tokens, positions with or without rows for these, norm before the blocks, LayerScale, MAP head.
    """
    w = {name: np.float64(array) for name, array in weights.items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        variance = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(queries: np.ndarray, keys: np.ndarray, name: str) -> np.ndarray:
        def split(x: np.ndarray) -> np.ndarray:
            return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

        q, k, v = (
            split(linear(x, f"{name}.{part}")) for x, part in ((queries, "q"), (keys, "k"), (keys, "v"))
        )
        score = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]))
        mixed = score / score.sum(axis=-1, keepdims=True) @ v
        return linear(mixed.transpose(0, 2, 1, 3).reshape(queries.shape), f"{name}.proj")

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        x = linear(x, f"{name}.fc1")
        if gelu == "swiglu":
            gate, value = np.split(x, 2, axis=-1)
            x = gate / (1 + np.exp(-gate)) * value
        else:
            x = x / (1 + np.exp(-1.702 * x)) if gelu == "quick" else _gelu(x, gelu)
        return linear(x, f"{name}.fc2")

    kernel = w["patch_embed.proj.weight"]
    n, side, patch = len(images), images.shape[1] // kernel.shape[-1], kernel.shape[-1]
    patches = images[:, : side * patch, : side * patch].reshape(n, side, patch, side, patch, 3)
    x = np.einsum("nyixjc,wcij->nyxw", patches, kernel).reshape(n, side * side, -1)
    x = x + w.get("patch_embed.proj.bias", 0.0)
    front = [w[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in w]
    count = sum(map(len, front))
    if front:
        x = np.concatenate([np.broadcast_to(np.concatenate(front), (n, count, x.shape[-1])), x], axis=1)
    positions = w["pos_embed"][0]
    own = len(positions) - side * side
    x[:, :own] += positions[:own]
    x[:, count:] += positions[own:]
    if "norm_pre.weight" in w:
        x = norm(x, "norm_pre")
    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        b = f"blocks.{i}"
        y = norm(x, f"{b}.norm1")
        x = x + attend(y, y, f"{b}.attn") * w.get(f"{b}.ls1.gamma", 1.0)
        x = x + mlp(norm(x, f"{b}.norm2"), f"{b}.mlp") * w.get(f"{b}.ls2.gamma", 1.0)
    if "norm.weight" in w:
        x = norm(x, "norm")
    if pool == "map":
        probe = np.broadcast_to(w["attn_pool.latent"], (n, 1, x.shape[-1]))
        x = attend(probe, x[:, count:], "attn_pool")
        return (x + mlp(norm(x, "attn_pool.norm"), "attn_pool.mlp"))[:, 0]
    x = x[:, count:].mean(axis=1) if pool == "gap" else x[:, 0]
    if "fc_norm.weight" in w:
        x = norm(x, "fc_norm")
    return linear(x, "head") if pool == "projection" else x
