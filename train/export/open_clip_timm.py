"""Vision towers that open_clip takes from timm: name, config and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_fast.inference.model import Model
from lit_fast.models.architecture import Architecture
from lit_fast.models.sizes import VARIANTS
from lit_fast.train.export.fold import image_head, image_projection
from lit_fast.train.export.vision_tower import own_vit
from lit_fast.weights import to_torch
from lit_fast.weights.timm import BLOCKS, epsilon_of, gelu_of
from lit_fast.weights.to_torch import Tensors

# Image sizes of timm's models by family, variant and patch size.
_SIZES: dict[str, dict[tuple[str, int], tuple[int, ...]]] = {
    "reg4_dinov2": {("S", 14): (518,), ("B", 14): (518,), ("L", 14): (518,)},
    "clip_quickgelu": {("B", 16): (224,), ("B", 32): (224,), ("L", 14): (224, 336), ("H", 14): (224, 378)},
    "siglip": {
        ("B", 16): (224, 256, 384, 512),
        ("B", 32): (256,),
        ("L", 16): (256, 384, 512),
        ("So400m", 14): (224, 378, 384),
        ("So400m", 16): (256, 384, 512),
        ("g-opt", 16): (256, 384),
    },
}
# Pooling, class token, registers, LayerNorm before the blocks and LayerNorm after pooling.
_TOKENS = {
    "reg4_dinov2": ("tok", True, 4, False, False),
    "clip_quickgelu": ("tok", True, 0, True, False),
    "siglip": ("map", False, 0, False, False),
}
_WORDS = {"S": "small", "B": "base", "L": "large", "So400m": "so400m", "H": "huge", "g-opt": "giantopt"}


def timm_name(a: Architecture, size: int) -> str | None:
    """Return the name of the timm model that computes a tower, None if there is none.

    Args:
      a: the tower's architecture.
      size: of the images in pixels.
    """
    pool = "tok" if a.pool == "projection" else a.pool
    tokens = (pool, a.class_token, a.registers, a.pre_norm, a.norm_after_pool)
    for family, models in _SIZES.items():
        for (variant, patch), sizes in models.items():
            name = f"vit_{_WORDS[variant]}_patch{patch}_{family}"
            name += "" if family == "reg4_dinov2" else f"_{size}"
            same_sizes = (VARIANTS[variant], patch) == (a.shape, a.patch) and size in sizes
            same_layers = (_TOKENS[family], gelu_of(name), epsilon_of(name)) == (tokens, a.gelu, a.epsilon)
            if same_sizes and same_layers:
                return name
    return None


def timm_vision(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return `vision_cfg` and the tensors of timm's ViT.

    Its linear layer centres and projects the features.
    """
    a, params, size = own_vit(model).architecture, own_vit(model).params, model.tower.preprocess.size
    config = {
        "image_size": size,
        "timm_model_name": timm_name(a, size),
        "timm_pool": "",  # the model's own
        "timm_proj": "linear",
        "timm_proj_bias": True,
    }
    tensors = to_torch.embedding("patch_embed.proj", params["embedding"])
    positions = params["pos_embedding"]
    if a.pre_norm:  # such models have no bias here
        positions = positions + params["embedding"]["bias"]
        tensors |= to_torch.norm("norm_pre", params["pre_norm"])
    else:
        tensors["patch_embed.proj.bias"] = params["embedding"]["bias"]
    if a.class_token:
        tensors["cls_token"] = params["cls"]
    if a.registers:
        tensors["reg_token"] = params["registers"]
    elif a.class_token:
        positions = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
    tensors["pos_embed"] = positions
    tensors |= to_torch.blocks(BLOCKS, params["Transformer"]["encoderblock"], layer_scale=a.registers > 0)
    tensors |= to_torch.norm("norm", params["Transformer"]["encoder_norm"])
    if a.pool == "map":
        head = params["MAPHead_0"]
        tensors["attn_pool.latent"] = head["probe"]
        names = ("attn_pool.q", "attn_pool.kv", "attn_pool.kv", "attn_pool.proj")
        tensors |= to_torch.attention(names, head["MultiHeadDotProductAttention_0"])
        tensors |= to_torch.norm("attn_pool.norm", head["LayerNorm_0"])
        tensors |= to_torch.mlp(("attn_pool.mlp.fc1", "attn_pool.mlp.fc2"), head["MlpBlock_0"])
    shift = np.asarray(model.params["mean"], np.float64) @ image_head(model)
    projection = to_torch.dense("head.proj", {"kernel": image_projection(model), "bias": -shift})
    return config, to_torch.contiguous(tensors, "trunk.") | projection
