"""Export as a folder of Hugging Face's transformers: `AutoModel` and `AutoProcessor` load it, without remote code.

    vision tower            text tower          class
    SigLIP (MAP head)       pooling "last"      SiglipModel: both towers as they are
    every other pair                            VisionTextDualEncoderModel of
    ViT, DeiT, DINOv2                             ViTModel
    DINOv2 with registers                         Dinov2WithRegistersModel
    CLIP                                          CLIPVisionModel
    SigLIP                                        SiglipVisionModel
                            "last", "first", "mean", masked or not
                                                  MegatronBertModel: pre-LN, bidirectional, learned positions; its
                                                  pooling is ours by `lit_fast.train.export.pooling_layer`

Names and formulas are those of transformers' model files. Centring, which they do not know, becomes a part of
the last bias on the image's side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lit_fast.errors import UserError
from lit_fast.inference.model import Model
from lit_fast.models.architecture import Architecture
from lit_fast.models.text_tower import EPSILON
from lit_fast.storage.files import write_json
from lit_fast.towers.tower import Tower
from lit_fast.train.export.card import model_card, probability, rounding
from lit_fast.train.export.hf_tokenizer import check_tokenizer, write_tokenizer
from lit_fast.train.export.image_side import centered_map_head, centered_norm
from lit_fast.train.export.pixels import image_processor
from lit_fast.train.export.pooling_layer import plain, with_pooling_layer
from lit_fast.weights.from_torch import BlockNames
from lit_fast.weights.huggingface import ACTIVATION_NAMES, CLIP_BLOCKS, DINOV2_BLOCKS, VIT_BLOCKS
from lit_fast.weights.parameters import Params
from lit_fast.weights.to_torch import Tensors, attention, blocks, contiguous, dense, mlp, norm, patches

_MEGATRON = BlockNames(
    "encoder.layer.",
    ("attention.ln", "ln"),
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    (("intermediate.dense", "output.dense"),),
)
# MegatronBertModel ends in a tanh, which is the identity for what is this small.
_SMALL = 2.0**-16
_GELU = ACTIVATION_NAMES["tanh"]

_USE = """\
`pip install "transformers>=5.0"`, then:

```python
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}", backend="pil")
inputs = processor(
    text=["a dog", "a flower"], images=[image], padding="max_length", truncation=True, return_tensors="pt"
)
with torch.no_grad():
    outputs = model(**inputs)
outputs.image_embeds, outputs.text_embeds  # [n, {width}], of unit length
logits = outputs.logits_per_image{bias}  # [images, texts]; probabilities are their {probability}
```

Texts must be padded to {length} tokens and cut there, as in these lines.
"""


def check(model: Model) -> None:
    """Raises UserError naming what transformers cannot express; nothing has been written then."""
    config = model.config
    if config.pooling in ("max", "map"):
        raise UserError(
            f"transformers has no text tower of text.pooling {config.pooling!r}; export with --format lit_fast or onnx"
        )
    check_tokenizer(model.tokenizer)
    _vision_kind(model.tower.architecture)


def write(model: Model, folder: Path) -> None:
    """Write config.json, model.safetensors, the tokenizer's and the processor's files and a card."""
    siglip = _is_siglip(model)
    if siglip:
        config, tensors = _siglip(model)
    else:
        config, tensors = _dual_encoder(model)
    processor, notes = image_processor(model.tower.preprocess)
    write_json(folder / "config.json", config)
    save_file(contiguous(tensors), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(model.tokenizer, folder, masked=model.config.mask_padding)
    name = "SiglipProcessor" if siglip else "VisionTextDualEncoderProcessor"
    write_json(folder / "preprocessor_config.json", processor | {"processor_class": name})
    write_json(folder / "processor_config.json", {"processor_class": name})
    bias = ""
    if "b" in model.params and not siglip:
        bias = f" {model.params['b'][0]:+.6g}"
        notes.append(
            "VisionTextDualEncoderModel has no bias: its logits lack the model's, which is added above."
        )
    if not siglip:
        notes.append(
            "The text tower has one more layer, which pools, and needs float32 or bfloat16: float16 overflows."
        )
    use = _USE.format(
        name=model.name,
        width=model.width,
        bias=bias,
        probability=probability(model),
        length=model.tokenizer.max_length,
    )
    notes.append(rounding(model))
    (folder / "README.md").write_text(model_card(model, use, notes, library="transformers"), encoding="utf-8")


def _is_siglip(model: Model) -> bool:
    text = model.config
    native = text.pooling == "last" and not text.mask_padding
    return native and model.tower.architecture.pool == "map" and "img" not in model.params


def _siglip(model: Model) -> tuple[dict[str, Any], Tensors]:
    vision_config, vision = _vision(model.tower, model.params["mean"])
    txt, shape = plain(model.params["txt"]), model.config.shape
    text = {
        "embeddings.token_embedding.weight": txt["Embed_0"]["embedding"],
        "embeddings.position_embedding.weight": txt["pos_embedding"][0],
    }
    text |= blocks(CLIP_BLOCKS, txt["Encoder_0"]["encoderblock"])
    text |= norm("final_layer_norm", txt["Encoder_0"]["encoder_norm"]) | dense("head", txt["head"])
    text_config = {
        "model_type": "siglip_text_model",
        "vocab_size": len(txt["Embed_0"]["embedding"]),
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": model.tokenizer.max_length,
        "hidden_act": _GELU,
        "layer_norm_eps": EPSILON,
        "projection_size": model.width,
        **_token_ids(model),
    }
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "dtype": "float32",
        "text_config": text_config,
        "vision_config": vision_config,
    }
    bias = model.params["b"] if "b" in model.params else np.zeros(1, np.float32)
    tensors = {"logit_scale": model.params["t"], "logit_bias": bias}
    return config, tensors | contiguous(text, "text_model.") | contiguous(vision, "vision_model.")


def _dual_encoder(model: Model) -> tuple[dict[str, Any], Tensors]:
    params, tower = model.params, model.tower
    head = params["img"]["head"]["kernel"] if "img" in params else np.eye(model.width, dtype=np.float32)
    if tower.architecture.pool == "projection":
        head = tower.params["projection"]["kernel"] @ head
    vision_config, vision = _vision(tower, params["mean"])
    text_config, text, text_head = _text(model)
    config = {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "dtype": "float32",
        "projection_dim": model.width,
        "logit_scale_init_value": float(params["t"][0]),
        "text_config": text_config,
        "vision_config": vision_config,
    }
    tensors = {
        "logit_scale": np.asarray(params["t"][0]),
        "visual_projection.weight": head.T,
        "text_projection.weight": text_head.T,
    }
    return config, tensors | contiguous(text, "text_model.") | contiguous(vision, "vision_model.")


def _text(model: Model) -> tuple[dict[str, Any], Tensors, np.ndarray]:
    """Configuration and tensors of MegatronBertModel, and the projection [its width, ours]."""
    end = model.tokenizer.eos_id if model.config.mask_padding else None
    pooled = with_pooling_layer(model.params["txt"], model.config.pooling, end)
    txt, block = pooled.params, pooled.params["Encoder_0"]["encoderblock"]
    table = txt["Embed_0"]["embedding"]
    width = table.shape[1]
    tensors = {
        "embeddings.word_embeddings.weight": table,
        "embeddings.position_embeddings.weight": txt["pos_embedding"][0],
        "embeddings.token_type_embeddings.weight": np.zeros((1, width), np.float32),
        "pooler.dense.weight": np.eye(width) * _SMALL,
        "pooler.dense.bias": np.zeros(width),
    }
    tensors |= blocks(_MEGATRON, block) | norm("encoder.ln", txt["Encoder_0"]["encoder_norm"])
    config = {
        "model_type": "megatron-bert",
        "vocab_size": len(table),
        "hidden_size": width,
        "intermediate_size": model.config.shape.mlp_dim,
        "num_hidden_layers": model.config.shape.depth + 1,
        "num_attention_heads": model.config.shape.heads,
        "max_position_embeddings": model.tokenizer.max_length,
        "type_vocab_size": 1,
        "hidden_act": _GELU,
        "layer_norm_eps": pooled.epsilon,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **_token_ids(model),
    }
    return config, tensors, txt["head"]["kernel"]


def _token_ids(model: Model) -> dict[str, Any]:
    tokenizer = model.tokenizer
    pad = tokenizer.eos_id if model.config.mask_padding else tokenizer.pad_id
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def _vision_kind(a: Architecture) -> str:
    """The model type that computes a tower.

    Raises:
      UserError: there is none.
    """
    if a.gelu == "swiglu":
        raise UserError("SwiGLU vision towers export with --format lit_fast or onnx, not transformers")
    plain_tokens = not a.registers and not a.pre_norm
    if a.pool == "map" and plain_tokens and not a.class_token and not a.norm_after_pool:
        return "siglip_vision_model"
    if a.pool in ("tok", "projection") and a.class_token:
        if a.pre_norm and not a.registers:
            return "clip_vision_model"
        if a.pool == "tok" and not a.pre_norm:
            return "dinov2_with_registers" if a.registers else "vit"
    raise UserError(
        f'transformers has no vision tower like this one (pooling "{a.pool}", class token {a.class_token}, '
        f"{a.registers} registers); export with --format lit_fast or onnx"
    )


def _vision(tower: Tower, mean: np.ndarray) -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors of the vision model, whose pooled output is the centred feature."""
    a, params = tower.architecture, tower.params
    kind = _vision_kind(a)
    sizes = {
        "model_type": kind,
        "hidden_size": a.shape.width,
        "intermediate_size": a.shape.mlp_dim,
        "num_hidden_layers": a.shape.depth,
        "num_attention_heads": a.shape.heads,
        "image_size": tower.preprocess.size,
        "patch_size": a.patch,
        "hidden_act": ACTIVATION_NAMES[a.gelu],
        "layer_norm_eps": a.epsilon,
    }
    block = params["Transformer"]["encoderblock"]
    positions = params["pos_embedding"][0]
    patch_bias = params["embedding"]["bias"]
    if kind == "siglip_vision_model":
        head = centered_map_head(params["MAPHead_0"], mean)
        tensors = patches("embeddings.patch_embedding", params["embedding"])
        tensors |= {
            "embeddings.patch_embedding.bias": patch_bias,
            "embeddings.position_embedding.weight": positions,
            "head.probe": head["probe"],
        }
        tensors |= blocks(CLIP_BLOCKS, block) | norm("post_layernorm", params["Transformer"]["encoder_norm"])
        names = (
            "head.attention.in_proj",
            "head.attention.in_proj",
            "head.attention.in_proj",
            "head.attention.out_proj",
        )
        inner = attention(names, head["MultiHeadDotProductAttention_0"])
        tensors |= {name.replace("in_proj.", "in_proj_"): tensor for name, tensor in inner.items()}
        tensors |= norm("head.layernorm", head["LayerNorm_0"])
        tensors |= mlp(("head.mlp.fc1", "head.mlp.fc2"), head["MlpBlock_0"])
        return sizes, tensors
    if kind == "clip_vision_model":
        tensors = patches("embeddings.patch_embedding", params["embedding"])
        tensors |= {
            "embeddings.class_embedding": params["cls"][0, 0],
            # The convolution has no bias, the class token no position of its own.
            "embeddings.position_embedding.weight": np.pad(positions + patch_bias, ((1, 0), (0, 0))),
        }
        tensors |= norm("pre_layrnorm", params["pre_norm"]) | blocks(CLIP_BLOCKS, block)
        return sizes, tensors | norm("post_layernorm", centered_norm(tower, mean))
    tensors = patches("embeddings.patch_embeddings.projection", params["embedding"])
    tensors |= {
        "embeddings.patch_embeddings.projection.bias": patch_bias,
        "embeddings.cls_token": params["cls"],
        "embeddings.position_embeddings": np.pad(positions, ((1, 0), (0, 0)))[None],
    }
    tensors |= norm("layernorm", centered_norm(tower, mean))
    if kind == "dinov2_with_registers":
        tensors |= {
            "embeddings.register_tokens": params["registers"],
            "embeddings.mask_token": np.zeros((1, a.shape.width), np.float32),
        }
        for i in range(a.shape.depth):  # LayerScale is a part of the layers before it
            for name in DINOV2_BLOCKS.scales[0]:
                tensors[f"{DINOV2_BLOCKS.block}{i}.{name}"] = np.ones(a.shape.width, np.float32)
        ratio = -(-a.shape.mlp_dim // a.shape.width)  # a whole number; a further unit of zeros does nothing
        block = block | {"MlpBlock_0": _widened(block["MlpBlock_0"], ratio * a.shape.width)}
        sizes |= {"num_register_tokens": a.registers, "mlp_ratio": ratio}
        return sizes, tensors | blocks(DINOV2_BLOCKS, block)
    tensors |= {"pooler.dense.weight": np.eye(a.shape.width), "pooler.dense.bias": np.zeros(a.shape.width)}
    return sizes | {"pooler_act": "linear"}, tensors | blocks(VIT_BLOCKS, block)


def _widened(layers: Params, hidden: int) -> Params:
    first, last = layers["Dense_0"], layers["Dense_1"]
    more = hidden - first["bias"].shape[-1]
    first = {
        "kernel": np.pad(first["kernel"], ((0, 0), (0, 0), (0, more))),
        "bias": np.pad(first["bias"], ((0, 0), (0, more))),
    }
    return {
        "Dense_0": first,
        "Dense_1": last | {"kernel": np.pad(last["kernel"], ((0, 0), (0, more), (0, 0)))},
    }
