"""Vision towers that open_clip takes from timm: name, config and tensors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lit_fast.inference.model import Model
from lit_fast.models.architecture import Architecture
from lit_fast.models.sizes import VARIANTS
from lit_fast.train.export.fold import image_head, image_projection
from lit_fast.weights import to_torch
from lit_fast.weights.timm import BLOCKS, epsilon_of, gelu_of
from lit_fast.weights.to_torch import Tensors

# By variant. A name gives the patch size and the image size; without the latter it is 518 pixels.
_TIMM_NAMES = {
    "S": ["vit_small_patch14_reg4_dinov2"],
    "B": [
        "vit_base_patch14_reg4_dinov2",
        "vit_base_patch16_clip_quickgelu_224",
        "vit_base_patch32_clip_quickgelu_224",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_siglip_256",
        "vit_base_patch16_siglip_384",
        "vit_base_patch16_siglip_512",
        "vit_base_patch32_siglip_256",
    ],
    "L": [
        "vit_large_patch14_reg4_dinov2",
        "vit_large_patch14_clip_quickgelu_224",
        "vit_large_patch14_clip_quickgelu_336",
        "vit_large_patch16_siglip_256",
        "vit_large_patch16_siglip_384",
        "vit_large_patch16_siglip_512",
    ],
    "So400m": [
        "vit_so400m_patch14_siglip_224",
        "vit_so400m_patch14_siglip_378",
        "vit_so400m_patch14_siglip_384",
        "vit_so400m_patch16_siglip_256",
        "vit_so400m_patch16_siglip_384",
        "vit_so400m_patch16_siglip_512",
    ],
    "H": ["vit_huge_patch14_clip_quickgelu_224", "vit_huge_patch14_clip_quickgelu_378"],
    "g-opt": ["vit_giantopt_patch16_siglip_256", "vit_giantopt_patch16_siglip_384"],
}


def timm_name(a: Architecture, size: int) -> str | None:
    """Return the name of the timm model that computes a tower, None if there is none.

    Args:
      a: the tower's architecture.
      size: of the images in pixels.
    """
    pool = "tok" if a.pool == "projection" else a.pool
    tokens = (pool, a.class_token, a.registers, a.pre_norm, a.norm_after_pool)
    signature = (a.patch, size, a.gelu, a.epsilon, *tokens)
    for variant, names in _TIMM_NAMES.items():
        for name in names:
            if VARIANTS[variant] == a.shape and _signature(name) == signature:
                return name
    return None


def _signature(name: str) -> tuple[object, ...]:
    """Return patch, size, GELU, epsilon, pooling and tokens of a model of timm."""
    numbers = re.search(r"patch(\d+)\D.*?(?:_(\d+))?$", name)
    assert numbers is not None
    clip, dinov2 = "_clip_" in name, "_dinov2" in name
    tokens = ("map", False, 0, False, False)
    if clip or dinov2:
        tokens = ("tok", True, 4 if dinov2 else 0, clip, False)
    return (int(numbers[1]), int(numbers[2] or 518), gelu_of(name), epsilon_of(name), *tokens)


def timm_vision(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return `vision_cfg` and the tensors of timm's ViT.

    Its linear layer centres and projects the features.
    """
    a, params, size = model.tower.architecture, model.tower.params, model.tower.preprocess.size
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
