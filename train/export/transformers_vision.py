"""Vision towers as models of transformers that return the centred feature."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture
from lit_fast.towers.tower import Tower
from lit_fast.train.export.fold import centered_map_head, centered_norm
from lit_fast.weights import to_torch
from lit_fast.weights.huggingface import ACTIVATION_NAMES, CLIP_BLOCKS, DINOV2_BLOCKS, VIT_BLOCKS
from lit_fast.weights.to_torch import Tensors


def check_vision(a: Architecture) -> None:
    """Raise UserError if transformers has no model that computes a tower."""
    if a.gelu == "swiglu":
        raise UserError(
            "transformers cannot express a vision tower with SwiGLU; export with --format lit_fast or onnx"
        )
    if _model_type(a) is None:
        raise UserError(
            f'transformers has no vision tower like this one (pooling "{a.pool}", class token {a.class_token}, '
            f"{a.registers} registers); export with --format lit_fast or onnx"
        )


def vision_model(tower: Tower, mean: np.ndarray) -> tuple[dict[str, Any], Tensors]:
    """Return the configuration and tensors of a tower's model.

    `mean` [width] is subtracted from its pooled output.
    """
    a = tower.architecture
    model_type = _model_type(a)
    config = {
        "model_type": model_type,
        "hidden_size": a.shape.width,
        "intermediate_size": a.shape.mlp_dim,
        "num_hidden_layers": a.shape.depth,
        "num_attention_heads": a.shape.heads,
        "image_size": tower.preprocess.size,
        "patch_size": a.patch,
        "hidden_act": ACTIVATION_NAMES[a.gelu],
        "layer_norm_eps": a.epsilon,
    }
    if model_type == "siglip_vision_model":
        return config, _siglip(tower, mean)
    if model_type == "clip_vision_model":
        return config, _clip(tower, mean)
    tensors = _vit_embeddings(tower) | to_torch.norm("layernorm", centered_norm(tower, mean))
    if model_type == "dinov2_with_registers":
        mlp_ratio = -(-a.shape.mlp_dim // a.shape.width)  # a whole number; hidden units of zeros fill it up
        config |= {"num_register_tokens": a.registers, "mlp_ratio": mlp_ratio}
        return config, tensors | _registers_and_blocks(tower, mlp_ratio * a.shape.width)
    tensors |= {"pooler.dense.weight": np.eye(a.shape.width), "pooler.dense.bias": np.zeros(a.shape.width)}
    tensors |= to_torch.blocks(VIT_BLOCKS, tower.params["Transformer"]["encoderblock"])
    return config | {"pooler_act": "linear"}, tensors


def _model_type(a: Architecture) -> str | None:
    """Return the model type that computes a tower, None if there is none."""
    if a.pool == "map" and not (a.registers or a.pre_norm or a.class_token or a.norm_after_pool):
        return "siglip_vision_model"
    if a.pool in ("tok", "projection") and a.class_token and a.pre_norm and not a.registers:
        return "clip_vision_model"
    if a.pool == "tok" and a.class_token and not a.pre_norm:
        return "dinov2_with_registers" if a.registers else "vit"
    return None


def _siglip(tower: Tower, mean: np.ndarray) -> Tensors:
    params = tower.params
    head = centered_map_head(params["MAPHead_0"], mean)
    tensors = to_torch.embedding("embeddings.patch_embedding", params["embedding"]) | {
        "embeddings.patch_embedding.bias": params["embedding"]["bias"],
        "embeddings.position_embedding.weight": params["pos_embedding"][0],
        "head.probe": head["probe"],
    }
    tensors |= to_torch.blocks(CLIP_BLOCKS, params["Transformer"]["encoderblock"])
    tensors |= to_torch.norm("post_layernorm", params["Transformer"]["encoder_norm"])
    in_proj = "head.attention.in_proj"
    names = (in_proj, in_proj, in_proj, "head.attention.out_proj")
    tensors |= to_torch.attention(names, head["MultiHeadDotProductAttention_0"])
    tensors |= to_torch.norm("head.layernorm", head["LayerNorm_0"])
    return tensors | to_torch.mlp(("head.mlp.fc1", "head.mlp.fc2"), head["MlpBlock_0"])


def _clip(tower: Tower, mean: np.ndarray) -> Tensors:
    params = tower.params
    # The convolution has no bias, and the class token has no position of its own in the parameters.
    positions = params["pos_embedding"][0] + params["embedding"]["bias"]
    tensors = to_torch.embedding("embeddings.patch_embedding", params["embedding"]) | {
        "embeddings.class_embedding": params["cls"][0, 0],
        "embeddings.position_embedding.weight": np.pad(positions, ((1, 0), (0, 0))),
    }
    tensors |= to_torch.norm("pre_layrnorm", params["pre_norm"])
    tensors |= to_torch.blocks(CLIP_BLOCKS, params["Transformer"]["encoderblock"])
    return tensors | to_torch.norm("post_layernorm", centered_norm(tower, mean))


def _vit_embeddings(tower: Tower) -> Tensors:
    """Return the embeddings that ViTModel and Dinov2WithRegistersModel share."""
    params, name = tower.params, "embeddings.patch_embeddings.projection"
    return to_torch.embedding(name, params["embedding"]) | {
        f"{name}.bias": params["embedding"]["bias"],
        "embeddings.cls_token": params["cls"],
        "embeddings.position_embeddings": np.pad(params["pos_embedding"], ((0, 0), (1, 0), (0, 0))),
    }


def _registers_and_blocks(tower: Tower, mlp_dim: int) -> Tensors:
    """Convert registers and blocks; pad the MLPs with zeros to `mlp_dim` hidden units."""
    params, shape = tower.params, tower.architecture.shape
    block = params["Transformer"]["encoderblock"]
    first, last = block["MlpBlock_0"]["Dense_0"], block["MlpBlock_0"]["Dense_1"]
    none, more = (0, 0), (0, mlp_dim - shape.mlp_dim)
    mlp = {
        "Dense_0": {
            "kernel": np.pad(first["kernel"], (none, none, more)),
            "bias": np.pad(first["bias"], (none, more)),
        },
        "Dense_1": last | {"kernel": np.pad(last["kernel"], (none, more, none))},
    }
    return to_torch.blocks(DINOV2_BLOCKS, block | {"MlpBlock_0": mlp}, layer_scale=True) | {
        "embeddings.register_tokens": params["registers"],
        "embeddings.mask_token": np.zeros((1, shape.width), np.float32),
    }
