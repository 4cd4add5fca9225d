"""Export as a directory of open_clip.

`create_model_and_transforms("local-dir:DIR")` and CLIP_benchmark load it.

    text tower                          in open_clip
    pooling "last", "first"             its TextTransformer, unchanged
    "mean"; any with a masked padding   the same with one more layer, see `lit_fast.train.export.pooling_layer`
    vision tower
    ViT, DeiT, DINOv2, CLIP             its VisionTransformer, unchanged
    SigLIP, registers, quick GELU       timm's ViT of the same shape, if timm has one
    of timm or open_clip                the same, by its name

Centring and the image head are folded into the last weights on the image's side. Names and formulas are those of
open_clip/transformer.py, model.py and timm_model.py.

open_clip can hide padding only together with a class token that it appends to the text ("embed_cls"). It then hides
each position whose predecessor is padding. If end-of-sentence is also the padding, this is correct: the first
end-of-sentence is visible; the positions after it and the class token, which pools, are hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lit_fast.errors import UserError
from lit_fast.inference.model import Model
from lit_fast.models.architecture import Architecture
from lit_fast.models.text_tower import EPSILON
from lit_fast.storage.paths import join
from lit_fast.storage.text_files import write_json
from lit_fast.towers.tower import Tower
from lit_fast.train.export.card import rounding_note, write_card
from lit_fast.train.export.fold import centered_norm, image_projection, with_text_head
from lit_fast.train.export.hf_tokenizer import check_tokenizer, write_tokenizer
from lit_fast.train.export.open_clip_timm import timm_name, timm_vision
from lit_fast.train.export.open_clip_torch import torch_vision
from lit_fast.train.export.pooling_layer import check_pooling, with_pooling_layer
from lit_fast.train.export.preprocessing import check_open_clip_preprocess, open_clip_preprocess
from lit_fast.train.export.vision_tower import own_vit
from lit_fast.train.export.writer import ExportOptions
from lit_fast.weights import to_torch
from lit_fast.weights.open_clip import BLOCKS
from lit_fast.weights.to_torch import Tensors

_TEXT_REPAIR = (
    "open_clip's tokenizer repairs text first (ftfy: mojibake, curly quotes, HTML entities; white space), which "
    "lit_fast does not: such texts may get other ids."
)
_RANGE = "The text tower has one more layer, which pools, and needs float32 or bfloat16: float16 overflows (--no_amp)."


def check(model: Model, options: ExportOptions) -> None:
    """Raise UserError if open_clip cannot express the model.

    With `nearest_pixels` the preprocessing may differ.
    """
    check_pooling(model.config.pooling, "open_clip")
    check_tokenizer(model.tokenizer)
    preprocess = model.tower.preprocess
    if not options.nearest_pixels:
        check_open_clip_preprocess(
            preprocess, "transformers" if isinstance(model.tower, Tower) else "lit_fast"
        )
    if not isinstance(model.tower, Tower):
        torch_vision(model)
        return
    a = model.tower.architecture
    if not _is_vision_transformer(a) and timm_name(a, preprocess.size) is None:
        raise UserError(
            f"open_clip has no vision tower like this one (pooling {a.pool!r}, {a.gelu} GELU, {a.registers} registers, "
            f"{preprocess.size} pixels); export with --format lit_fast or onnx"
        )


def write(model: Model, directory: str, options: ExportOptions) -> None:
    """Write the configuration, the weights, the tokenizer's files and the card."""
    preprocess, notes = open_clip_preprocess(model.tower.preprocess)
    text_config, text = _text(model)
    if not isinstance(model.tower, Tower):
        vision_config, vision = torch_vision(model)
    elif _is_vision_transformer(model.tower.architecture):
        vision_config, vision = _vision_transformer(model)
    else:
        vision_config, vision = timm_vision(model)
    config: dict[str, Any] = {
        "embed_dim": model.width,
        "custom_text": True,
        "init_logit_scale": float(model.params["t"][0]),
        "vision_cfg": vision_config,
        "text_cfg": text_config,
    }
    tensors: Tensors = {"logit_scale": np.asarray(model.params["t"][0])}
    if "b" in model.params:
        config["init_logit_bias"] = float(model.params["b"][0])
        tensors["logit_bias"] = np.asarray(model.params["b"][0])
    tensors |= to_torch.contiguous(vision, "visual.") | to_torch.contiguous(text, "text.")
    write_json(join(directory, "open_clip_config.json"), {"model_cfg": config, "preprocess_cfg": preprocess})
    save_file(tensors, join(directory, "open_clip_model.safetensors"), {"format": "pt"})
    write_tokenizer(model.tokenizer, directory, masked=model.config.mask_padding)
    notes += [rounding_note(model), _TEXT_REPAIR] + ([] if _has_native_pooling(model) else [_RANGE])
    write_card(directory, model, "open_clip", notes)


def _has_native_pooling(model: Model) -> bool:
    """Return whether open_clip's TextTransformer pools and masks as the text tower."""
    return model.config.pooling in ("last", "first") and not model.config.mask_padding


def _text(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return `text_cfg` and the tensors of TextTransformer."""
    pooling, masked, tokenizer = model.config.pooling, model.config.mask_padding, model.tokenizer
    if _has_native_pooling(model):
        txt, epsilon = with_text_head(model.params["txt"]), EPSILON
    else:
        txt, epsilon = with_pooling_layer(model.params["txt"], pooling, tokenizer.eos_id if masked else None)
    table, positions = txt["Embed_0"]["embedding"], txt["pos_embedding"][0]
    width = table.shape[1]
    config = {
        "context_length": tokenizer.max_length,
        "vocab_size": len(table),
        "hf_tokenizer_name": model.name,  # the repository on the Hub; for a local directory any name works
        "width": width,
        "heads": model.config.shape.heads,
        "layers": len(txt["Encoder_0"]["encoderblock"]["LayerNorm_0"]["scale"]),
        "mlp_ratio": _mlp_ratio(model.config.shape.mlp_dim, width),
        "no_causal_mask": True,
        "pool_type": "first" if pooling == "first" else "last",
        "proj_bias": True,
        "act_kwargs": {"approximate": "tanh"},
        "norm_kwargs": {"eps": epsilon},
    }
    tensors = {"token_embedding.weight": table}
    if masked:
        config |= {"embed_cls": True, "pad_id": tokenizer.eos_id}
        tensors["cls_emb"] = np.zeros(width, np.float32)
        positions = np.pad(positions, ((0, 1), (0, 0)))
    tensors["positional_embedding"] = positions
    tensors |= to_torch.blocks(BLOCKS, txt["Encoder_0"]["encoderblock"])
    tensors |= to_torch.norm("ln_final", txt["Encoder_0"]["encoder_norm"])
    return config, tensors | to_torch.dense("text_projection", txt["head"])


def _mlp_ratio(mlp_dim: int, width: int) -> float:
    """Return the ratio from which open_clip computes `int(width * ratio) == mlp_dim`."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def _is_vision_transformer(a: Architecture) -> bool:
    """Return whether open_clip's own VisionTransformer can compute a tower."""
    known_tokens = a.class_token and not a.registers
    return known_tokens and a.pool in ("tok", "gap", "projection") and a.gelu in ("exact", "tanh")


def _vision_transformer(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return `vision_cfg` and the tensors of VisionTransformer."""
    tower = own_vit(model)
    a, params = tower.architecture, tower.params
    config: dict[str, Any] = {
        "image_size": tower.preprocess.size,
        "patch_size": a.patch,
        "width": a.shape.width,
        "layers": a.shape.depth,
        "head_width": a.shape.width // a.shape.heads,
        "mlp_ratio": _mlp_ratio(a.shape.mlp_dim, a.shape.width),
        "no_ln_pre": not a.pre_norm,
        "pool_type": "avg" if a.pool == "gap" else "tok",
        "final_ln_after_pool": a.norm_after_pool,
        "norm_kwargs": {"eps": a.epsilon},
        "act_kwargs": {"approximate": "tanh" if a.gelu == "tanh" else "none"},
    }
    # The convolution has no bias, and the class token has no position of its own in the parameters.
    positions = params["pos_embedding"][0] + params["embedding"]["bias"]
    tensors = to_torch.embedding("conv1", params["embedding"]) | {
        "class_embedding": params["cls"][0, 0],
        "positional_embedding": np.pad(positions, ((1, 0), (0, 0))),
        "proj": image_projection(model),
    }
    if a.pre_norm:
        tensors |= to_torch.norm("ln_pre", params["pre_norm"])
    tensors |= to_torch.blocks(BLOCKS, params["Transformer"]["encoderblock"])
    return config, tensors | to_torch.norm("ln_post", centered_norm(tower, model.params["mean"]))
