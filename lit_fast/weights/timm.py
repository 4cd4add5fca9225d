"""Read vision towers in timm's layout: `config.json` with `architecture` and `pretrained_cfg`.

Sizes come from the tensors. Heads, non-linearity and epsilon, which have no tensors, follow from the architecture's
name, as timm defines it (models/vision_transformer.py, models/deit.py).
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from lit_fast.errors import UnsupportedModelError
from lit_fast.weights.from_torch import BlockNames, attention, blocks, dense, embedding, mlp, norm, packed
from lit_fast.weights.parameters import Params, Weights, architecture_of, square_grid
from lit_fast.weights.reader import WeightsFile, open_safetensors, unusable_weights

BLOCKS = BlockNames(
    "blocks.",
    ("norm1", "norm2"),
    ("attn.qkv", "attn.qkv", "attn.qkv", "attn.proj"),
    (("mlp.fc1", "mlp.fc2"), ("mlp.w12", "mlp.w3")),
    (("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")),
)
# Names outside of this pattern are other models with the same beginning (rope, relpos, DINOv3, ...).
_SUPPORTED = re.compile(
    r"vit_[a-z0-9]+_patch\d+(_plus)?(_reg\d)?(_clip(_quickgelu)?|_siglip|_dinov2|_tipsv2)?(_gap|_map)?(_\d+)?(_miil)?"
    r"|deit3?_[a-z]+(_distilled)?_patch\d+_\d+|flexivit_[a-z]+"
)
_UNSUPPORTED = re.compile(r"vit_(d|p|dp)(wee|little)_|vit_intern|_18x2|_36x1")
_ACTIVATIONS = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}
_POOLS = {"token": "tok", "avg": "gap", "map": "map"}
# Arguments that change nothing, or nothing that the tensors do not show.
_HARMLESS = {
    "embed_dim", "depth", "patch_size", "img_size", "mlp_ratio", "init_values", "class_token", "no_embed_class",
    "reg_tokens", "num_classes", "qkv_bias", "fc_norm", "dynamic_img_size", "in_chans", "drop_rate",
    "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init",
    "fix_init",
}  # fmt: skip


def load_timm(path: str, config: dict[str, Any], where: str) -> Weights:
    """Read a ViT, DeiT, DeiT III, DINOv2, CLIP or SigLIP tower.

    The feature is timm's own (`num_classes=0`), except for CLIP, whose projection timm keeps as a classifier
    without bias: it is applied, as everywhere else for CLIP. Of a distilled DeiT it is the class token, as in
    transformers; timm takes the mean of it and the distillation token.

    Args:
      path: the weights.
      config: content of `config.json`.
      where: path of `config.json`, for messages.

    Raises:
      UnsupportedModelError: it is another kind of model.
      UserError: an array is missing, in excess or of another shape.
    """
    name = str(config.get("architecture")).partition(".")[0]
    if not supported(name):
        raise UnsupportedModelError(
            f"{where}: architecture {name} is not supported; give timm's plain ViT, DeiT, DeiT III, "
            f"DINOv2 (also reg4), CLIP or SigLIP"
        )
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise unusable_weights(where, "model_args is not an object")
    unknown = arguments.keys() - _HARMLESS - {"num_heads", "act_layer", "global_pool"}
    if unknown:
        raise UnsupportedModelError(
            f"{where}: the model argument {min(unknown)} is not supported; give another model"
        )
    gelu = _ACTIVATIONS.get(str(arguments["act_layer"])) if "act_layer" in arguments else gelu_of(name)
    pooling = arguments.get("global_pool", config.get("global_pool"))
    if gelu is None:
        names = ", ".join(_ACTIVATIONS)
        raise UnsupportedModelError(
            f"{where}: act_layer {arguments['act_layer']!r} is not supported; supported are {names}"
        )
    if pooling is not None and str(pooling) not in _POOLS:
        raise UnsupportedModelError(
            f"{where}: global_pool {pooling!r} is not supported; supported are {', '.join(_POOLS)}"
        )
    with open_safetensors(path) as file:
        params: Params = {
            "embedding": embedding(file, "patch_embed.proj", bias="norm_pre.weight" not in file.shapes)
        }
        width = len(params["embedding"]["bias"])
        heads = arguments.get("num_heads", heads_of(name, width))
        params["Transformer"] = {"encoderblock": blocks(file, BLOCKS, width, heads)}
        if "fc_norm.weight" in file.shapes:
            params["pooled_norm"] = norm(file, "fc_norm", width)
        else:
            params["Transformer"]["encoder_norm"] = norm(file, "norm", width)
        params |= _tokens(file, width)
        if "norm_pre.weight" in file.shapes:
            params["pre_norm"] = norm(file, "norm_pre", width)
        if "attn_pool.latent" in file.shapes:
            params["MAPHead_0"] = _map_head(file, width, heads)
        if "_clip" in name and "head.weight" in file.shapes:
            biased = "head.bias" in file.shapes and file.take("head.bias").any()
            if not biased:  # a fine-tuned classifier has a bias, CLIP's projection none
                params["projection"] = {"kernel": file.take("head.weight", None, width).T}
        file.refuse_unused(re.compile(r"(head|head_dist|pre_logits)\..*|mask_token").fullmatch)
    pool = None if pooling is None else _POOLS[str(pooling)]
    return Weights(params, architecture_of(params, gelu, epsilon_of(name), pool), "bicubic-antialias")


def supported(name: str) -> bool:
    """Return whether a name is that of a plain ViT, which this module can read."""
    return _SUPPORTED.fullmatch(name) is not None and not _UNSUPPORTED.search(name)


def epsilon_of(name: str) -> float:
    """Return LayerNorm's epsilon in an architecture."""
    return 1e-5 if "_clip" in name else 1e-6


def gelu_of(name: str) -> str:
    """Return the non-linearity of an architecture without SwiGLU, as in `Architecture.gelu`."""
    if "quickgelu" in name:
        return "quick"
    # SigLIP's later sizes; the first ones are exact in timm, though trained with tanh.
    tanh = (
        r"base_patch32_siglip|large_patch16_siglip(_gap)?_512|so400m_patch16_siglip|giantopt_patch16_siglip"
    )
    return "tanh" if re.search(tanh, name) else "exact"


def heads_of(name: str, width: int) -> int:
    """Return the number of attention heads of an architecture."""
    if width in (1152, 1280, 1408, 1664) or "giantopt" in name or name == "vit_base_patch16_gap_224":
        return 16
    return max(width // 64, 1)


def _tokens(file: WeightsFile, width: int) -> Params:
    """Convert positions and class, distillation and register tokens; positions of tokens are added to them."""
    front = [
        file.take(name, 1, None, width)[0]
        for name in ("cls_token", "dist_token", "reg_token", "register_tokens")
        if name in file.shapes
    ]
    tokens = np.concatenate([np.zeros((0, width), np.float32), *front])
    positions = file.take("pos_embed", 1, None, width)[0]
    after = len(positions) - len(tokens)
    if after > 0 and math.isqrt(after) ** 2 == after:
        tokens, positions = tokens + positions[: len(tokens)], positions[len(tokens) :]
    square_grid(len(positions), file.path)
    out = {"pos_embedding": positions[None]}
    if "cls_token" in file.shapes:
        out["cls"], tokens = tokens[None, :1], tokens[1:]
    if len(tokens):
        out["registers"] = tokens[None]
    return out


def _map_head(file: WeightsFile, width: int, heads: int) -> Params:
    query = dense(file, "attn_pool.q", width, width)
    key, value = packed(file, "attn_pool.kv.weight", "attn_pool.kv.bias", 2, width)
    out = dense(file, "attn_pool.proj", width, width)
    return {
        "probe": file.take("attn_pool.latent", 1, 1, width),
        "MultiHeadDotProductAttention_0": attention((query, key, value), out, heads),
        "LayerNorm_0": norm(file, "attn_pool.norm", width),
        "MlpBlock_0": mlp(file, "attn_pool.mlp.fc1", "attn_pool.mlp.fc2", width),
    }
