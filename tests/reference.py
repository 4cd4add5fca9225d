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


def _attention(x: np.ndarray, p: Any, seen: np.ndarray | None) -> np.ndarray:
    def project(name: str) -> np.ndarray:
        return np.tensordot(x, p[name]["kernel"], 1) + p[name]["bias"]  # [n, l, heads, head_dim]

    q, k, v = project("query"), project("key"), project("value")
    score = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    if seen is not None:
        score = np.where(seen[:, None, None, :], score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    mixed = np.einsum("nhqk,nkhd->nqhd", weight, v)
    return np.tensordot(mixed, p["out"]["kernel"], 2) + p["out"]["bias"]


def encoder(x: np.ndarray, params: Any, gelu: str, seen: np.ndarray | None = None) -> np.ndarray:
    """Pre-LN encoder with a final LayerNorm; block parameters stacked on a leading axis."""
    blocks = params["encoderblock"]
    depth = len(blocks["LayerNorm_0"]["scale"])
    for i in range(depth):
        p = _layer(blocks, i)
        x = x + _attention(_norm(x, p["LayerNorm_0"]), p["MultiHeadDotProductAttention_0"], seen)
        mlp = p["MlpBlock_0"]
        hidden = _gelu(_norm(x, p["LayerNorm_1"]) @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"], gelu)
        x = x + hidden @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"]
    return _norm(x, params["encoder_norm"])


def _layer(tree: Any, i: int) -> Any:
    if isinstance(tree, dict):
        return {k: _layer(v, i) for k, v in tree.items()}
    return np.float64(tree[i])


def augreg_vit(images: np.ndarray, arrays: dict[str, np.ndarray], gelu: str) -> np.ndarray:
    """Class-token features of normalised images [n, s, s, 3], from an AugReg file's own arrays and names."""
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
