"""Read published text towers of SigLIP and SigLIP 2, from files of big_vision, transformers or open_clip.

big_vision (models/proj/image_text/text_transformer.py): a `.npz` with the tower alone or under `txt/`, blocks
stacked or one by one. transformers (models/siglip, siglip2): a directory with config.json and
model.safetensors, the text tower alone or both. open_clip: see `lit_fast.weights.open_clip`.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.errors import UserError
from lit_fast.storage.files import is_file
from lit_fast.storage.paths import join, parent, suffix
from lit_fast.storage.text_files import read_object
from lit_fast.weights.from_torch import blocks, dense, norm
from lit_fast.weights.huggingface import CLIP_BLOCKS
from lit_fast.weights.npz import open_npz, stack_blocks
from lit_fast.weights.open_clip import read_open_clip_text
from lit_fast.weights.parameters import Params, nested
from lit_fast.weights.reader import open_safetensors, unusable_weights
from lit_fast.weights.resolve import local_weights, weights_digest

_ROOTS = ("", "params/", "opt/target/")
_TOWER = re.compile(r"(Embed_0|embedding_projection|Encoder_0|MAPHead_0|head)/.+|pos_embedding")
# Arrays beside the text tower: the image tower, the optimizer, temperature and bias.
_IGNORED = re.compile(r"(img|opt)/.*|[tb]")
_BLOCK = "Encoder_0/encoderblock/"
# T5's vocabularies end with this many pieces that no caption has, and big_vision's tables have no rows for them.
_SENTINELS = 100


class TextWeights(NamedTuple):
    """A published text tower.

    Attributes:
      source: path or name, as the user gave it.
      path: of the local weights file.
      sha256: digest of the weights.
      params: float32 arrays, nested under big_vision's names; blocks are stacked on a leading axis.
      loss: those of "t", log temperature [1], and "b", bias [1], that the file has.
    """

    source: str
    path: str
    sha256: str
    params: Params
    loss: dict[str, np.ndarray]


def read_text_weights(source: str) -> TextWeights:
    """Read a text tower from a file, a directory or a name, see `lit_fast.weights.resolve`.

    `source` may end in `:txt`, as in big_vision, where a file has both towers.

    Raises:
      UserError: there is no such file or name, or it is not such a tower.
    """
    path = local_weights(source.removesuffix(":txt"))
    flat, loss = _read_npz(path) if suffix(path) == ".npz" else _read_safetensors(path)
    for name, array in loss.items():
        if array.size != 1:
            raise unusable_weights(path, f"{name} has shape {array.shape}, expected a single number")
    params = nested(flat, path)
    loss = {name: array.reshape(1) for name, array in loss.items()}
    return TextWeights(source, path, weights_digest(path), params, loss)


def start_from(weights: TextWeights, fresh: Params) -> tuple[Params, str]:
    """Replace a run's initial parameters by published ones.

    * Longer positional embeddings are cut, as transformers does for shorter captions.
    * The head is replaced if its output has the features' width, and temperature and bias with it, as they belong to
      its embeddings. Otherwise all three keep their initial values.

    Args:
      weights: see `read_text_weights`.
      fresh: the initial parameters, see `lit_fast.models.two_towers`.

    Returns:
      The parameters, and a description of those that were replaced.

    Raises:
      UserError: the tower differs from that of the configuration and the tokens.
    """
    have = flatten_dict(weights.params, sep="/")
    want = flatten_dict(fresh["txt"], sep="/")
    notes = ["all parameters"]
    published, configured = (_text_config(flat, weights.path) for flat in (have, want))
    if configured["text.head"] and _output_width(have) != _output_width(want):
        have = {name: a for name, a in have.items() if not name.startswith("head/")}
        have |= {name: a for name, a in want.items() if name.startswith("head/")}
        published["text.head"] = True
        notes = ["all parameters but the head"]
        loss = {}
    else:
        loss = {name: a for name, a in weights.loss.items() if name in fresh}
    wrong = [f"{key} = {json.dumps(value)}" for key, value in published.items() if configured[key] != value]
    if wrong:
        raise UserError(
            f"the text tower of {weights.path} differs from the configured one; set {', '.join(wrong)}"
        )
    have["Embed_0/embedding"] = _embedding(have, want, weights.path)
    length, wanted = (flat["pos_embedding"].shape[1] for flat in (have, want))
    if length < wanted:
        raise UserError(
            f"{weights.path} has {length} positions, the tokens have {wanted}; make them with: "
            f"lit-fast tokenize --max-length {length}"
        )
    if length > wanted:
        have["pos_embedding"] = have["pos_embedding"][:, :wanted]
        notes.append(f"the first {wanted} of {length} positions")
    for name in sorted(have.keys() | want.keys()):
        shapes = [flat[name].shape if name in flat else None for flat in (have, want)]
        if shapes[0] != shapes[1]:
            raise unusable_weights(
                weights.path, f"{name} has shape {shapes[0]}, the text tower needs {shapes[1]}"
            )
    if "t" in loss:
        notes.append(f"temperature {np.exp(loss['t'][0]):.4g}")
    if "b" in loss:
        notes.append(f"bias {loss['b'][0]:.4g}")
    return fresh | {"txt": nested(have, weights.path)} | loss, ", ".join(notes)


def _read_npz(path: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    with open_npz(path) as file:
        prefixes = [root + sub for root in _ROOTS for sub in ("", "txt/")]
        prefix = next((p for p in prefixes if f"{p}Embed_0/embedding" in file.shapes), None)
        if prefix is None:
            raise UserError(
                f"{path} has no text tower: Embed_0/embedding is missing; give one of SigLIP (LiT's BERT towers are "
                "not supported)"
            )
        inside = {n.removeprefix(prefix): n for n in file.shapes if n.startswith(prefix)}
        flat = stack_blocks(file, {n: full for n, full in inside.items() if _TOWER.fullmatch(n)}, "Encoder_0")
        root = prefix.removesuffix("txt/")
        loss = {name: file.take(root + name) for name in ("t", "b") if root + name in file.shapes}
        file.refuse_unused(lambda n: not n.startswith(prefix) or _IGNORED.fullmatch(n.removeprefix(prefix)))
    second = flat.pop("Encoder_0/pos_embedding", None)
    if second is not None:  # some old runs added positions twice
        if second.shape != getattr(flat.get("pos_embedding"), "shape", None):
            raise unusable_weights(path, "Encoder_0/pos_embedding does not have the shape of pos_embedding")
        flat["pos_embedding"] = flat["pos_embedding"] + second
    return flat, loss


def _read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    where, other = join(parent(path), "config.json"), join(parent(path), "open_clip_config.json")
    if is_file(other) and not is_file(where):
        tower, loss = read_open_clip_text(path, read_object(other), other)
        return flatten_dict(tower, sep="/"), loss
    config = read_object(where)
    kind = config.get("model_type")
    if kind in ("siglip", "siglip2"):
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise unusable_weights(where, "text_config is missing")
        config = text
    elif kind not in ("siglip_text_model", "siglip2_text_model"):
        raise UserError(f"{where}: model type {kind!r} has no supported text tower; give SigLIP or SigLIP 2")
    heads = config.get("num_attention_heads", 12)
    # TextTower has one activation and one epsilon, those of all published towers.
    for key, value in {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}.items():
        if config.get(key, value) != value:
            raise unusable_weights(where, f"{key} is {config[key]!r}, but only {value!r} is supported")
    with open_safetensors(path) as file:
        prefix = "text_model." if any(n.startswith("text_model.") for n in file.shapes) else ""
        table = file.take(f"{prefix}embeddings.token_embedding.weight", None, None)
        width = table.shape[1]
        names = CLIP_BLOCKS._replace(block=prefix + CLIP_BLOCKS.block)
        params: dict[str, Any] = {
            "Embed_0": {"embedding": table},
            "pos_embedding": file.take(f"{prefix}embeddings.position_embedding.weight", None, width)[None],
            "Encoder_0": {
                "encoderblock": blocks(file, names, width, heads),
                "encoder_norm": norm(file, f"{prefix}final_layer_norm", width),
            },
        }
        if f"{prefix}head.weight" in file.shapes:
            params["head"] = dense(file, f"{prefix}head", width, None)
        pairs = {"t": "logit_scale", "b": "logit_bias"}
        loss = {name: file.take(key) for name, key in pairs.items() if key in file.shapes}
        file.refuse_unused(re.compile(r"vision_model\..*|.*\bposition_ids").fullmatch)
    return flatten_dict(params, sep="/"), loss


def _output_width(flat: Params) -> int:
    """Return the width of an embedding: that of the head, without one that of the tower."""
    return flat["head/kernel" if "head/kernel" in flat else "pos_embedding"].shape[-1]


def _text_config(flat: Params, path: str) -> dict[str, Any]:
    """Return the keys of the configuration that follow from the shapes of a tower."""

    def size(name: str, rank: int, axis: int) -> int:
        shape = flat[name].shape if name in flat else ()
        if len(shape) != rank:
            raise unusable_weights(path, f"no text tower, {name} has shape {shape or None}")
        return int(shape[axis])

    depth = size(f"{_BLOCK}LayerNorm_0/scale", 2, 0)
    table = size("Embed_0/embedding", 2, 1)
    width = size("pos_embedding", 3, 2)
    if "head/kernel" in flat and size("head/kernel", 2, 0) != width:
        shape = flat["head/kernel"].shape
        raise unusable_weights(
            path, f"head/kernel has shape {shape}, expected {width} rows, the width of the tower"
        )
    return {
        "text.width": width,
        "text.depth": depth,
        "text.mlp_dim": size(f"{_BLOCK}MlpBlock_0/Dense_0/kernel", 3, 2),
        "text.heads": size(f"{_BLOCK}MultiHeadDotProductAttention_0/query/kernel", 4, 2),
        "text.embedding_width": table if "embedding_projection/kernel" in flat else 0,
        "text.pooling": "map" if "MAPHead_0/probe" in flat else "last",  # other poolings have no parameters
        "text.head": "head/kernel" in flat,
    }


def _embedding(have: Params, want: Params, path: str) -> np.ndarray:
    """Return the published table of token embeddings, with initial rows for T5's last pieces if it has none."""
    table, fresh = have["Embed_0/embedding"], want["Embed_0/embedding"]
    missing = len(fresh) - len(table)
    if not 0 <= missing <= _SENTINELS:
        raise UserError(
            f"{path} has a vocabulary of {len(table)} pieces, the tokens one of {len(fresh)}; make tokens with its "
            f"vocabulary: lit-fast tokenize --tokenizer FILE.model"
        )
    if missing and table.shape[1] == fresh.shape[1]:  # another width is refused with the other shapes
        table = np.concatenate([table, np.asarray(fresh[len(table) :])])
    return table
