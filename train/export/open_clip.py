"""Export as a folder of open_clip: `create_model_and_transforms("local-dir:DIR")` loads it, and CLIP_benchmark with it.

    text tower                          in open_clip
    pooling "last", "first"             its TextTransformer, as it is
    "mean"; any with a masked padding   the same with one more layer, see `lit_fast.train.export.pooling_layer`
    vision tower
    ViT, DeiT, DINOv2, CLIP             its VisionTransformer, as it is
    SigLIP, registers, quick GELU       timm's ViT of the same shape, where timm has a name for it

Centring and the image head are in the last weights on the image's side. Names and formulas are those of
open_clip/transformer.py, model.py and timm_model.py.

open_clip can hide padding only together with a class token that it appends to the text ("embed_cls"). It then
hides each position whose predecessor is padding, which is the right one if end-of-sentence pads: the first
end-of-sentence is seen, what follows it is not, nor is the class token, which pools.
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
from lit_fast.train.export.image_side import centered_norm
from lit_fast.train.export.pixels import check_open_clip, open_clip_preprocess
from lit_fast.train.export.pooling_layer import plain, with_pooling_layer
from lit_fast.train.export.timm_names import timm_name
from lit_fast.weights.from_torch import BlockNames
from lit_fast.weights.parameters import Params
from lit_fast.weights.timm import BLOCKS as TIMM_BLOCKS
from lit_fast.weights.to_torch import Tensors, attention, blocks, contiguous, dense, mlp, norm, patches

_BLOCKS = BlockNames(
    "transformer.resblocks.",
    ("ln_1", "ln_2"),
    ("attn.in_proj", "attn.in_proj", "attn.in_proj", "attn.out_proj"),
    (("mlp.c_fc", "mlp.c_proj"),),
)

_USE = """\
`pip install open_clip_torch transformers timm`, then:

```python
import open_clip
import torch

model, _, preprocess = open_clip.create_model_and_transforms("{address}"){here}
model.eval()
tokenizer = open_clip.get_tokenizer("{address}")
with torch.no_grad():
    images = model.encode_image(preprocess(image)[None], normalize=True)  # of a PIL image, [1, {width}]
    texts = model.encode_text(tokenizer(["a dog", "a flower"]), normalize=True)  # [2, {width}]
    logits = model.logit_scale.exp() * images @ texts.T{bias}  # [1, 2]; probabilities are their {probability}
```

CLIP_benchmark evaluates it with `--model {address} --pretrained ""`. It takes class names and templates as they
are written; `lit-fast eval` puts them in lower case and without punctuation first, as big_vision does.
"""
_TO_THE_HUB = """
For the Hub export it with `--push OWNER/NAME`: open_clip looks for the tokenizer in the repository that the files name.
"""
_CLEANED = (
    "open_clip's tokenizer repairs text first (ftfy: mojibake, curly quotes, HTML entities; white space), which "
    "lit_fast does not: such texts may get other ids."
)
_RANGE = "The text tower has one more layer, which pools, and needs float32 or bfloat16: float16 overflows (--no_amp)."


def check(model: Model, *, nearest_pixels: bool = False) -> None:
    """Raises UserError naming what open_clip cannot express; nothing has been written then.

    Args:
      nearest_pixels: preprocessing may differ; the card will say so.
    """
    pooling = model.config.pooling
    if pooling in ("max", "map"):
        raise UserError(
            f"open_clip has no text tower of text.pooling {pooling!r}; export with --format lit_fast or onnx"
        )
    check_tokenizer(model.tokenizer)
    if not nearest_pixels:
        check_open_clip(model.tower.preprocess)
    tower = model.tower
    if not _native(tower.architecture) and timm_name(tower.architecture, tower.preprocess.size) is None:
        a = tower.architecture
        raise UserError(
            f"open_clip has no vision tower like this one (pooling {a.pool!r}, {a.gelu} GELU, {a.registers} registers, "
            f"{tower.preprocess.size} pixels); export with --format lit_fast or onnx"
        )


def write(model: Model, folder: Path, *, nearest_pixels: bool = False) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors, the tokenizer's files and a card."""
    preprocess, notes = open_clip_preprocess(model.tower.preprocess)
    text_config, text = _text(model)
    vision_config, vision = _vision(model)
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
    tensors |= contiguous(vision, "visual.") | contiguous(text, "text.")
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    save_file(contiguous(tensors), folder / "open_clip_model.safetensors", {"format": "pt"})
    write_tokenizer(model.tokenizer, folder, masked=model.config.mask_padding)
    notes += [rounding(model), _CLEANED] + ([] if _text_is_native(model) else [_RANGE])
    card = model_card(model, _use(model), notes, library="open_clip")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _use(model: Model) -> str:
    pushed = "/" in model.name  # OWNER/NAME
    return _USE.format(
        address=f"{'hf-hub' if pushed else 'local-dir'}:{model.name}",
        here="" if pushed else "  # this folder",
        width=model.width,
        bias=" + model.logit_bias" if "b" in model.params else "",
        probability=probability(model),
    ) + ("" if pushed else _TO_THE_HUB)


def _text_is_native(model: Model) -> bool:
    return model.config.pooling in ("last", "first") and not model.config.mask_padding


def _text(model: Model) -> tuple[dict[str, Any], Tensors]:
    """`text_cfg` and the tensors of TextTransformer."""
    pooling, masked, tokenizer = model.config.pooling, model.config.mask_padding, model.tokenizer
    txt, epsilon = plain(model.params["txt"]), EPSILON
    if not _text_is_native(model):
        txt, epsilon = with_pooling_layer(model.params["txt"], pooling, tokenizer.eos_id if masked else None)
    table, positions = txt["Embed_0"]["embedding"], txt["pos_embedding"][0]
    width, hidden = table.shape[1], model.config.shape.mlp_dim
    config = {
        "context_length": tokenizer.max_length,
        "vocab_size": len(table),
        "hf_tokenizer_name": model.name,  # the repository on the Hub; of a folder, any name will do
        "width": width,
        "heads": model.config.shape.heads,
        "layers": len(txt["Encoder_0"]["encoderblock"]["LayerNorm_0"]["scale"]),
        "mlp_ratio": _ratio(hidden, width),
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
    tensors |= _transformer(txt["Encoder_0"]["encoderblock"])
    tensors |= norm("ln_final", txt["Encoder_0"]["encoder_norm"]) | dense("text_projection", txt["head"])
    return config, tensors


def _transformer(block: Params) -> Tensors:
    tensors = blocks(_BLOCKS, block)
    return {name.replace("in_proj.", "in_proj_"): tensor for name, tensor in tensors.items()}


def _ratio(hidden: int, width: int) -> float:
    """What times `width` is `hidden`, when it is cut to a whole number."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _native(a: Architecture) -> bool:
    """Whether open_clip's own VisionTransformer can compute a tower."""
    plain_tokens = a.class_token and not a.registers
    return plain_tokens and a.pool in ("tok", "gap", "projection") and a.gelu in ("exact", "tanh")


def _vision(model: Model) -> tuple[dict[str, Any], Tensors]:
    """`vision_cfg` and the tensors of VisionTransformer or of timm's ViT."""
    tower = model.tower
    head = np.eye(model.width, dtype=np.float32)
    if "img" in model.params:
        head = model.params["img"]["head"]["kernel"]
    if _native(tower.architecture):
        return _vision_transformer(tower, model.params["mean"], head)
    return _timm(tower, model.params["mean"], head)


def _vision_transformer(tower: Tower, mean: np.ndarray, head: np.ndarray) -> tuple[dict[str, Any], Tensors]:
    a, params = tower.architecture, tower.params
    if a.pool == "projection":
        head = params["projection"]["kernel"] @ head
    config: dict[str, Any] = {
        "image_size": tower.preprocess.size,
        "patch_size": a.patch,
        "width": a.shape.width,
        "layers": a.shape.depth,
        "head_width": a.shape.width // a.shape.heads,
        "mlp_ratio": _ratio(a.shape.mlp_dim, a.shape.width),
        "no_ln_pre": not a.pre_norm,
        "pool_type": "avg" if a.pool == "gap" else "tok",
        "final_ln_after_pool": a.norm_after_pool,
        "norm_kwargs": {"eps": a.epsilon},
        "act_kwargs": {"approximate": "tanh" if a.gelu == "tanh" else "none"},
    }
    # The convolution has no bias, the class token no position of its own.
    positions = params["pos_embedding"][0] + params["embedding"]["bias"]
    tensors = patches("conv1", params["embedding"]) | {
        "class_embedding": params["cls"][0, 0],
        "positional_embedding": np.pad(positions, ((1, 0), (0, 0))),
        "proj": head,
    }
    if a.pre_norm:
        tensors |= norm("ln_pre", params["pre_norm"])
    tensors |= _transformer(params["Transformer"]["encoderblock"])
    return config, tensors | norm("ln_post", centered_norm(tower, mean))


def _timm(tower: Tower, mean: np.ndarray, head: np.ndarray) -> tuple[dict[str, Any], Tensors]:
    a, params = tower.architecture, tower.params
    config = {
        "image_size": tower.preprocess.size,
        "timm_model_name": timm_name(a, tower.preprocess.size),
        "timm_pool": "",  # the model's own
        "timm_proj": "linear",
        "timm_proj_bias": True,
    }
    shift = np.asarray(mean, np.float64) @ head
    if a.pool == "projection":
        head = params["projection"]["kernel"] @ head
    tensors = patches("trunk.patch_embed.proj", params["embedding"])
    positions = params["pos_embedding"]
    if a.pre_norm:  # and then no bias
        positions = positions + params["embedding"]["bias"]
        tensors |= norm("trunk.norm_pre", params["pre_norm"])
    else:
        tensors["trunk.patch_embed.proj.bias"] = params["embedding"]["bias"]
    if a.class_token:
        tensors["trunk.cls_token"] = params["cls"]
    if a.registers:
        tensors["trunk.reg_token"] = params["registers"]
        for i in range(a.shape.depth):  # LayerScale is a part of the layers before it
            for name in TIMM_BLOCKS.scales[0]:
                tensors[f"trunk.{TIMM_BLOCKS.block}{i}.{name}"] = np.ones(a.shape.width)
    elif a.class_token:
        positions = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
    tensors["trunk.pos_embed"] = positions
    names = TIMM_BLOCKS._replace(block=f"trunk.{TIMM_BLOCKS.block}")
    tensors |= blocks(names, params["Transformer"]["encoderblock"])
    tensors |= norm("trunk.norm", params["Transformer"]["encoder_norm"])
    if a.pool == "map":
        tensors |= _timm_map_head(params["MAPHead_0"])
    return config, tensors | dense("head.proj", {"kernel": head, "bias": -shift})


def _timm_map_head(head: Params) -> Tensors:
    start = "trunk.attn_pool."
    parts = (f"{start}q", f"{start}k", f"{start}v", f"{start}proj")
    tensors = attention(parts, head["MultiHeadDotProductAttention_0"])
    for kind in ("weight", "bias"):
        pair = [tensors.pop(f"{part}.{kind}") for part in parts[1:3]]
        tensors[f"{start}kv.{kind}"] = np.concatenate(pair)
    tensors |= {f"{start}latent": head["probe"]} | norm(f"{start}norm", head["LayerNorm_0"])
    return tensors | mlp((f"{start}mlp.fc1", f"{start}mlp.fc2"), head["MlpBlock_0"])
