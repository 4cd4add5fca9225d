"""Export as a directory of Hugging Face's transformers.

`AutoModel` and `AutoProcessor` load it without remote code.

    vision tower            text tower          class
    SigLIP (MAP head)       pooling "last"      SiglipModel: both towers unchanged
    every other pair                            VisionTextDualEncoderModel of
    ViT, DeiT, DINOv2                             ViTModel
    DINOv2 with registers                         Dinov2WithRegistersModel
    CLIP                                          CLIPVisionModel
    SigLIP                                        SiglipVisionModel
                            "last", "first", "mean", masked or not
                                                  MegatronBertModel: pre-LN, bidirectional, learned positions; its
                                                  pooling is `lit_fast.train.export.pooling_layer`

Names and formulas are those of transformers' model files. Centring, which they lack, is folded into the last bias on
the image's side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lit_fast.inference.model import Model
from lit_fast.models.text_tower import EPSILON
from lit_fast.storage.paths import join
from lit_fast.storage.text_files import write_json
from lit_fast.train.export.card import rounding_note, write_card
from lit_fast.train.export.fold import image_projection, with_text_head
from lit_fast.train.export.hf_tokenizer import check_tokenizer, write_tokenizer
from lit_fast.train.export.pooling_layer import check_pooling, with_pooling_layer
from lit_fast.train.export.preprocessing import image_processor
from lit_fast.train.export.transformers_vision import check_vision, vision_model
from lit_fast.train.export.vision_tower import own_vit
from lit_fast.train.export.writer import ExportOptions
from lit_fast.weights import to_torch
from lit_fast.weights.from_torch import BlockNames
from lit_fast.weights.huggingface import ACTIVATION_NAMES, CLIP_BLOCKS
from lit_fast.weights.parameters import Params
from lit_fast.weights.to_torch import Tensors

_MEGATRON_BLOCKS = BlockNames(
    "encoder.layer.",
    ("attention.ln", "ln"),
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    (("intermediate.dense", "output.dense"),),
)
# MegatronBertModel ends in a tanh, which is the identity for inputs of this size.
_TANH_SCALE = 2.0**-16

_NO_BIAS = "VisionTextDualEncoderModel has no bias: its logits lack the model's, which is added above."
_RANGE = "The text tower has one more layer, which pools, and needs float32 or bfloat16: float16 overflows."


def check(model: Model, options: ExportOptions) -> None:
    """Raise UserError if transformers cannot express the tokenizer or a tower."""
    check_pooling(model.config.pooling, "transformers")
    check_tokenizer(model.tokenizer)
    check_vision(own_vit(model).architecture)


def write(model: Model, directory: str, options: ExportOptions) -> None:
    """Write configuration, weights, tokenizer, processor and card."""
    processor, notes = image_processor(model.tower.preprocess)
    bias = ""
    if _is_siglip(model):
        config, tensors = _siglip(model)
        processor_class = "SiglipProcessor"
    else:
        config, tensors = _dual_encoder(model)
        processor_class = "VisionTextDualEncoderProcessor"
        if "b" in model.params:
            bias = f" {model.params['b'][0]:+.6g}"
            notes.append(_NO_BIAS)
        notes.append(_RANGE)
    notes.append(rounding_note(model))
    write_json(join(directory, "config.json"), config)
    save_file(to_torch.contiguous(tensors), join(directory, "model.safetensors"), {"format": "pt"})
    write_tokenizer(model.tokenizer, directory, masked=model.config.mask_padding)
    class_entry = {"processor_class": processor_class}
    write_json(join(directory, "preprocessor_config.json"), processor | class_entry)
    write_json(join(directory, "processor_config.json"), class_entry)
    write_card(directory, model, "transformers", notes, bias=bias)


def _is_siglip(model: Model) -> bool:
    """Return whether SiglipModel computes both towers unchanged."""
    native_text = model.config.pooling == "last" and not model.config.mask_padding
    return native_text and own_vit(model).architecture.pool == "map" and "img" not in model.params


def _siglip(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return the configuration and the tensors of SiglipModel."""
    vision_config, vision = vision_model(own_vit(model), model.params["mean"])
    txt = with_text_head(model.params["txt"])
    text = {
        "embeddings.token_embedding.weight": txt["Embed_0"]["embedding"],
        "embeddings.position_embedding.weight": txt["pos_embedding"][0],
    }
    text |= to_torch.blocks(CLIP_BLOCKS, txt["Encoder_0"]["encoderblock"])
    text |= to_torch.norm("final_layer_norm", txt["Encoder_0"]["encoder_norm"])
    text |= to_torch.dense("head", txt["head"])
    text_config = _text_config(model, txt, "siglip_text_model", model.config.shape.depth, EPSILON)
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "dtype": "float32",
        "text_config": text_config | {"projection_size": model.width},
        "vision_config": vision_config,
    }
    bias = model.params["b"] if "b" in model.params else np.zeros(1, np.float32)
    tensors = {"logit_scale": model.params["t"], "logit_bias": bias}
    return config, tensors | _both_towers(text, vision)


def _dual_encoder(model: Model) -> tuple[dict[str, Any], Tensors]:
    """Return the configuration and the tensors of VisionTextDualEncoderModel."""
    vision_config, vision = vision_model(own_vit(model), model.params["mean"])
    text_config, text, text_projection = _megatron_bert(model)
    config = {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "dtype": "float32",
        "projection_dim": model.width,
        "logit_scale_init_value": float(model.params["t"][0]),
        "text_config": text_config,
        "vision_config": vision_config,
    }
    tensors = {
        "logit_scale": np.asarray(model.params["t"][0]),
        "visual_projection.weight": image_projection(model).T,
        "text_projection.weight": text_projection.T,
    }
    return config, tensors | _both_towers(text, vision)


def _both_towers(text: Tensors, vision: Tensors) -> Tensors:
    return to_torch.contiguous(text, "text_model.") | to_torch.contiguous(vision, "vision_model.")


def _megatron_bert(model: Model) -> tuple[dict[str, Any], Tensors, np.ndarray]:
    """Return configuration, tensors and projection for MegatronBertModel.

    The projection is float32 [width of the text tower, width of the embeddings].
    """
    eos_id = model.tokenizer.eos_id if model.config.mask_padding else None
    txt, epsilon = with_pooling_layer(model.params["txt"], model.config.pooling, eos_id)
    width = txt["pos_embedding"].shape[-1]
    tensors = {
        "embeddings.word_embeddings.weight": txt["Embed_0"]["embedding"],
        "embeddings.position_embeddings.weight": txt["pos_embedding"][0],
        "embeddings.token_type_embeddings.weight": np.zeros((1, width), np.float32),
        "pooler.dense.weight": np.eye(width) * _TANH_SCALE,
        "pooler.dense.bias": np.zeros(width),
    }
    tensors |= to_torch.blocks(_MEGATRON_BLOCKS, txt["Encoder_0"]["encoderblock"])
    tensors |= to_torch.norm("encoder.ln", txt["Encoder_0"]["encoder_norm"])
    config = _text_config(model, txt, "megatron-bert", model.config.shape.depth + 1, epsilon) | {
        "type_vocab_size": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return config, tensors, txt["head"]["kernel"]


def _text_config(model: Model, txt: Params, model_type: str, depth: int, epsilon: float) -> dict[str, Any]:
    vocab_size, width = txt["Embed_0"]["embedding"].shape
    tokenizer = model.tokenizer
    return {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": model.config.shape.mlp_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": model.config.shape.heads,
        "max_position_embeddings": tokenizer.max_length,
        "hidden_act": ACTIVATION_NAMES["tanh"],
        "layer_norm_eps": epsilon,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id if model.config.mask_padding else tokenizer.pad_id,
    }
