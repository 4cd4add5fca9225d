"""Small checkpoints with random weights, written in the namings of timm, transformers and big_vision."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower

Arrays = dict[str, np.ndarray]

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID = 24, 2, 3, 40, 4, 4
SIZE = PATCH * GRID

# The same arrays in transformers: beginnings and ends of names, in this order.
_COMMON = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "blocks.": "encoder.layer.",
    ".attn.q.": ".attention.attention.query.",
    ".attn.k.": ".attention.attention.key.",
    ".attn.v.": ".attention.attention.value.",
    ".attn.proj.": ".attention.output.dense.",
}
_VIT = _COMMON | {
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
_DINOV2 = _COMMON | {".ls1.gamma": ".layer_scale1.lambda1", ".ls2.gamma": ".layer_scale2.lambda1"}
_CLIP = {
    "patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "cls_token": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "norm_pre.": "vision_model.pre_layrnorm.",
    "blocks.": "vision_model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.q.": ".self_attn.q_proj.",
    ".attn.k.": ".self_attn.k_proj.",
    ".attn.v.": ".self_attn.v_proj.",
    ".attn.proj.": ".self_attn.out_proj.",
    "attn_pool.latent": "vision_model.head.probe",
    "attn_pool.proj.": "vision_model.head.attention.out_proj.",
    "attn_pool.norm.": "vision_model.head.layernorm.",
    "attn_pool.mlp.": "vision_model.head.mlp.",
    "head.weight": "visual_projection.weight",
}
_NAMES = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _CLIP,
}


def random_weights(
    *,
    tokens: dict[str, int] | None = None,
    positions: int = 0,
    swiglu: bool = False,
    scale: bool = False,
    head: str = "",
    pre_norm: bool = False,
    late_norm: bool = False,
    qkv_bias: bool = True,
) -> Arrays:
    """float32 arrays under timm's names, query, key and value apart; every one matters.

    `tokens` are further tokens and their numbers, `positions` the rows they have among the positions,
    `head` is "map", "projection" or nothing.
    """
    rng = np.random.default_rng(0)
    out: Arrays = {}

    def normal(*shape: int, std: float = 0.3, mean: float = 0.0) -> np.ndarray:
        return rng.normal(mean, std, shape).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = normal(outputs, inputs, std=1.5 / inputs**0.5)
        if bias:
            out[f"{name}.bias"] = normal(outputs)

    def norm(name: str) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = normal(WIDTH, mean=1.0), normal(WIDTH)

    out["patch_embed.proj.weight"] = normal(WIDTH, 3, PATCH, PATCH, std=0.2)
    if not pre_norm:
        out["patch_embed.proj.bias"] = normal(WIDTH)
    for name, count in (tokens or {}).items():
        out[name] = normal(1, count, WIDTH, std=1.0)
    out["pos_embed"] = normal(1, GRID**2 + positions, WIDTH, std=0.5)
    if pre_norm:
        norm("norm_pre")
    for i in range(DEPTH):
        b = f"blocks.{i}"
        norm(f"{b}.norm1")
        for part in "qkv":
            linear(f"{b}.attn.{part}", WIDTH, WIDTH, qkv_bias)
        linear(f"{b}.attn.proj", WIDTH, WIDTH)
        norm(f"{b}.norm2")
        linear(f"{b}.mlp.fc1", WIDTH, HIDDEN * (2 if swiglu else 1))
        linear(f"{b}.mlp.fc2", HIDDEN, WIDTH)
        if scale:
            out[f"{b}.ls1.gamma"], out[f"{b}.ls2.gamma"] = normal(WIDTH, std=1.0), normal(WIDTH, std=1.0)
    norm("fc_norm" if late_norm else "norm")
    if head == "map":
        out["attn_pool.latent"] = normal(1, 1, WIDTH, std=1.0)
        for part in "qkv":
            linear(f"attn_pool.{part}", WIDTH, WIDTH)
        linear("attn_pool.proj", WIDTH, WIDTH)
        norm("attn_pool.norm")
        linear("attn_pool.mlp.fc1", WIDTH, HIDDEN)
        linear("attn_pool.mlp.fc2", HIDDEN, WIDTH)
    if head == "projection":
        linear("head", WIDTH, 16, bias=False)
    return out


def packed(arrays: Arrays, parts: dict[str, str]) -> Arrays:
    """Arrays whose names hold `.q.`, ... joined along the first axis under the names that `parts` gives."""
    out = dict(arrays)
    for letters, joined in parts.items():
        for name in [n for n in arrays if f".{letters[0]}." in n]:
            names = [name.replace(f".{letters[0]}.", f".{letter}.") for letter in letters]
            out[name.replace(f".{letters[0]}.", f".{joined}.")] = np.concatenate([out.pop(n) for n in names])
    return out


def write_timm(directory: Path, arrays: Arrays, architecture: str, **config: Any) -> Path:
    """A directory as timm publishes them."""
    blocks = packed({n: a for n, a in arrays.items() if n.startswith("blocks.")}, {"qkv": "qkv"})
    rest = packed({n: a for n, a in arrays.items() if not n.startswith("blocks.")}, {"kv": "kv"})
    cfg = {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    config = {
        "architecture": architecture,
        "model_args": {"num_heads": HEADS},
        "pretrained_cfg": cfg,
    } | config
    return _write(directory, blocks | rest, config)


def write_huggingface(directory: Path, arrays: Arrays, kind: str, prefix: str = "", **config: Any) -> Path:
    """A directory as transformers writes them."""
    out: Arrays = {}
    for name, array in arrays.items():
        if name in ("cls_token", "pos_embed") and kind in ("clip_vision_model", "siglip_vision_model"):
            array = array[0, 0] if name == "cls_token" else array[0]
        for old, new in _NAMES[kind].items():
            name = name.replace(old, new) if not (old == "pos_embed" and name.startswith("patch")) else name
        if name.startswith("norm."):
            final = "vision_model.post_layernorm" if "vision_model" in kind else "layernorm"
            name = name.replace("norm", final, 1)
        out[prefix + name] = array
    for leaf in ("weight", "bias"):
        three = [out.pop(f"attn_pool.{part}.{leaf}", None) for part in "qkv"]
        if three[0] is not None:
            out[f"vision_model.head.attention.in_proj_{leaf}"] = np.concatenate(three)
    config = {"model_type": kind, "num_attention_heads": HEADS} | config
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}}
    directory.mkdir(exist_ok=True)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return _write(directory, out, config)


def _write(directory: Path, arrays: Arrays, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_npz(
    path: Path, arrays: Arrays, *, old: bool = False, stacked: bool = False, prefix: str = ""
) -> Path:
    """An `.npz` as big_vision writes them; `old` as before 2022, with the MAP head at the top."""
    attention = f"MultiHeadDotProductAttention_{1 if old else 0}"
    norm_1, mlp = ("LayerNorm_2", "MlpBlock_3") if old else ("LayerNorm_1", "MlpBlock_0")
    out: Arrays = {
        "embedding/kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": arrays["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding" if old else "pos_embedding": arrays["pos_embed"],
    }
    if "cls_token" in arrays:
        out["cls"] = arrays["cls_token"]

    def norm(new: str, name: str) -> None:
        out[f"{new}/scale"], out[f"{new}/bias"] = arrays[f"{name}.weight"], arrays[f"{name}.bias"]

    def block(new: str, name: str, names: tuple[str, str]) -> None:
        for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel, bias = (arrays[f"{name}{names[0]}{letter}.{leaf}"] for leaf in ("weight", "bias"))
            out[f"{new}/{attention}/{part}/kernel"] = kernel.T.reshape(WIDTH, HEADS, -1)
            out[f"{new}/{attention}/{part}/bias"] = bias.reshape(HEADS, -1)
        kernel, bias = (arrays[f"{name}{names[0]}proj.{leaf}"] for leaf in ("weight", "bias"))
        out[f"{new}/{attention}/out/kernel"] = kernel.T.reshape(HEADS, -1, WIDTH)
        out[f"{new}/{attention}/out/bias"] = bias
        norm(f"{new}/{names[1]}", f"{name}{'norm2' if 'blocks' in name else 'norm'}")
        for i in (0, 1):
            kernel, bias = (arrays[f"{name}mlp.fc{i + 1}.{leaf}"] for leaf in ("weight", "bias"))
            out[f"{new}/{mlp}/Dense_{i}/kernel"], out[f"{new}/{mlp}/Dense_{i}/bias"] = kernel.T, bias

    for i in range(DEPTH):
        norm(f"Transformer/encoderblock_{i}/LayerNorm_0", f"blocks.{i}.norm1")
        block(f"Transformer/encoderblock_{i}", f"blocks.{i}.", ("attn.", norm_1))
    norm("Transformer/encoder_norm", "norm")
    if "attn_pool.latent" in arrays:
        attention, mlp = "MultiHeadDotProductAttention_0", "MlpBlock_0"
        block("MAPHead_0", "attn_pool.", ("", "LayerNorm_0"))
        out["MAPHead_0/probe"] = arrays["attn_pool.latent"]
    if stacked:
        for name in [n for n in out if "encoderblock_0/" in n]:
            parts = [out.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(DEPTH)]
            out[name.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    if old:
        out = {name.removeprefix("MAPHead_0/"): array for name, array in out.items()}
    np.savez(path, **{prefix + name: array for name, array in out.items()})
    return path


def load_or_refuse(path: Path) -> None:
    """A damaged file may still be one; if it is refused, then in one line."""
    said = ""
    try:
        load_tower(str(path))
    except UserError as error:
        said = str(error)
    assert "\n" not in said
