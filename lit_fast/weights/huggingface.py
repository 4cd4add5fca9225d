"""Read vision towers in the layout of transformers: `config.json` beside `.safetensors`. The table is `FAMILIES`.

Names and defaults are those of transformers' model files and configuration classes (models/vit, deit,
dinov2, dinov2_with_registers, clip, siglip).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lit_fast.errors import UnsupportedModelError
from lit_fast.weights.from_torch import BlockNames, attention, blocks, dense, embedding, mlp, norm, packed
from lit_fast.weights.parameters import Params, Weights, architecture_of, square_grid
from lit_fast.weights.reader import WeightsFile, open_safetensors, unusable_weights

VIT_BLOCKS = BlockNames(
    "encoder.layer.",
    ("layernorm_before", "layernorm_after"),
    (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    ),
    (("intermediate.dense", "output.dense"),),
)
DINOV2_BLOCKS = VIT_BLOCKS._replace(
    norms=("norm1", "norm2"),
    mlps=(("mlp.fc1", "mlp.fc2"), ("mlp.weights_in", "mlp.weights_out")),
    scales=(("layer_scale1.lambda1", "layer_scale2.lambda1"),),
)
CLIP_BLOCKS = BlockNames(
    "encoder.layers.",
    ("layer_norm1", "layer_norm2"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    (("mlp.fc1", "mlp.fc2"),),
)

_ACTIVATIONS = {
    "gelu": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
}
ACTIVATION_NAMES = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}


class Family(NamedTuple):
    """A family of models with one `model_type`.

    Attributes:
      prefixes: of the tower's names where it is part of another model, longest first.
      blocks: names of the parts of a block.
      gelu: default of `hidden_act`.
      epsilon: default of `layer_norm_eps`.
      resampling: rule of `lit_fast.weights.positions`.
    """

    prefixes: tuple[str, ...]
    blocks: BlockNames
    gelu: str
    epsilon: float
    resampling: str = "bicubic"


FAMILIES = {
    "vit": Family(("vit.", ""), VIT_BLOCKS, "gelu", 1e-12),
    "deit": Family(("deit.", ""), VIT_BLOCKS, "gelu", 1e-12),
    "dinov2": Family(("dinov2.", ""), DINOV2_BLOCKS, "gelu", 1e-6),
    "dinov2_with_registers": Family(
        ("dinov2_with_registers.", ""), DINOV2_BLOCKS, "gelu", 1e-6, "bicubic-antialias"
    ),
    "clip_vision_model": Family(("vision_model.", ""), CLIP_BLOCKS, "quick_gelu", 1e-5),
    "siglip_vision_model": Family(("vision_model.", ""), CLIP_BLOCKS, "gelu_pytorch_tanh", 1e-6),
}
# Classifiers, poolers that are no features here, buffers, text towers, temperature and bias.
_IGNORED = re.compile(
    r"(\w*classifier|pooler|decoder|text_model|text_projection)\..*"
    r"|.*\b(mask_token|position_ids)|logit_scale|logit_bias"
)


def load_huggingface(path: str, config: dict[str, Any], where: str) -> Weights:
    """Read a ViT, DeiT, DINOv2, CLIP or SigLIP tower.

    The feature is the class token after the final LayerNorm (`last_hidden_state[:, 0]`) of ViT, DeiT and
    DINOv2, the projected one of CLIP where the weights hold the projection (`image_embeds`), the MAP head's
    output of SigLIP (`pooler_output`).

    Args:
      path: the weights.
      config: content of `config.json`.
      where: path of `config.json`, for messages.

    Raises:
      UnsupportedModelError: it is another kind of model.
      UserError: an array is missing, in excess or of another shape.
    """
    kind = config.get("model_type")
    if kind in ("clip", "siglip"):
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise unusable_weights(where, "vision_config is missing")
        kind, config = f"{kind}_vision_model", vision
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{where}: model type {kind!r} is not supported; give ViT, DeiT, DINOv2 (also with registers), "
            f"CLIP or SigLIP (also SigLIP 2 of fixed resolution)"
        )
    family = FAMILIES[kind]
    heads = config.get("num_attention_heads", 12)
    epsilon = config.get("layer_norm_eps", family.epsilon)
    gelu = config.get("hidden_act", family.gelu)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1e-2:
        raise unusable_weights(where, f"layer_norm_eps is {epsilon!r}, not a small positive number")
    if not isinstance(gelu, str) or gelu not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{where}: hidden_act {gelu!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    with open_safetensors(path) as file:
        prefix = next((p for p in family.prefixes if any(n.startswith(p) for n in file.shapes)), "")
        names = family.blocks._replace(block=prefix + family.blocks.block)
        patches, final = "embeddings.patch_embeddings.projection", "layernorm"
        if family.blocks is CLIP_BLOCKS:
            patches, final = "embeddings.patch_embedding", "post_layernorm"
        params: Params = {"embedding": embedding(file, prefix + patches, bias=kind != "clip_vision_model")}
        width = len(params["embedding"]["bias"])
        params["Transformer"] = {
            "encoderblock": blocks(file, names, width, heads, config.get("qkv_bias", True) is not False),
            "encoder_norm": norm(file, prefix + final, width),
        }
        params |= _tokens(file, prefix, width, kind)
        if kind == "clip_vision_model":
            params["pre_norm"] = norm(file, f"{prefix}pre_layrnorm", width)
            if "visual_projection.weight" in file.shapes:
                params["projection"] = {"kernel": file.take("visual_projection.weight", None, width).T}
        if kind == "siglip_vision_model":
            params["MAPHead_0"] = _map_head(file, f"{prefix}head.", width, heads)
        file.refuse_unused(
            lambda name: _IGNORED.fullmatch(name.removeprefix(prefix)) or _IGNORED.fullmatch(name)
        )
    return Weights(params, architecture_of(params, _ACTIVATIONS[gelu], epsilon), family.resampling)


def _tokens(file: WeightsFile, prefix: str, width: int, kind: str) -> Params:
    """Convert positions, class token and registers; the first positions are those of tokens and are added to them."""
    start = f"{prefix}embeddings."
    if kind == "siglip_vision_model":
        positions = file.take(f"{start}position_embedding.weight", None, width)
        square_grid(len(positions), file.path)
        return {"pos_embedding": positions[None]}
    if kind == "clip_vision_model":
        positions = file.take(f"{start}position_embedding.weight", None, width)
        front = [file.take(f"{start}class_embedding", width)[None]]
    else:
        positions = file.take(f"{start}position_embeddings", 1, None, width)[0]
        front = [file.take(f"{start}cls_token", 1, 1, width)[0]]
    if kind == "deit":
        front.append(file.take(f"{start}distillation_token", 1, 1, width)[0])
    square_grid(len(positions) - len(front), file.path)
    tokens = [token + positions[i] for i, token in enumerate(front)]
    if kind == "dinov2_with_registers":
        tokens.append(file.take(f"{start}register_tokens", 1, None, width)[0])
    out = {"pos_embedding": positions[None, len(front) :], "cls": tokens[0][None]}
    if len(tokens) > 1:
        out["registers"] = tokens[1][None]
    return out


def _map_head(file: WeightsFile, prefix: str, width: int, heads: int) -> Params:
    name = f"{prefix}attention.in_proj"
    three = packed(file, f"{name}_weight", f"{name}_bias", 3, width)
    out = dense(file, f"{prefix}attention.out_proj", width, width)
    return {
        "probe": file.take(f"{prefix}probe", 1, 1, width),
        "MultiHeadDotProductAttention_0": attention(three, out, heads),
        "LayerNorm_0": norm(file, f"{prefix}layernorm", width),
        "MlpBlock_0": mlp(file, f"{prefix}mlp.fc1", f"{prefix}mlp.fc2", width),
    }
