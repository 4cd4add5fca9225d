"""Read the text towers of open_clip's layout: `open_clip_config.json` beside `open_clip_model.safetensors`.

SigLIP's are those of `lit_fast.models.text_tower`: bidirectional, pooled at the last position. CLIP's have a causal
mask.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lit_fast.errors import UserError
from lit_fast.weights.from_torch import BlockNames, blocks, dense, norm
from lit_fast.weights.reader import WeightsFile, open_safetensors

BLOCKS = BlockNames(
    "transformer.resblocks.",
    ("ln_1", "ln_2"),
    ("attn.in_proj", "attn.in_proj", "attn.in_proj", "attn.out_proj"),
    (("mlp.c_fc", "mlp.c_proj"),),
)
_PREFIX = "text."
# What `TextTower` computes. SigLIP's activation is the tanh form, which open_clip's configurations do not always name.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "no_causal_mask": (True,),
    "pool_type": ("last",),
    "norm_kwargs": ({"eps": 1e-6},),
    "act_kwargs": (None, {"approximate": "tanh"}),
    "embed_cls": (False, None),
    "ls_init_value": (None,),
    "hf_model_name": (None,),
    "proj_type": (None, "linear"),
}


def read_open_clip_text(
    path: str, config: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a text tower.

    Args:
      path: the weights.
      config: content of `open_clip_config.json`.
      where: its path, for messages.

    Returns:
      Parameters under big_vision's names, and "t" and "b" as far as there are any, each of one number.

    Raises:
      UserError: it is another kind of text tower, or an array is missing, in excess or of another shape.
    """
    model = config.get("model_cfg", config)
    text = model.get("text_cfg") if isinstance(model, dict) else None
    if not isinstance(text, dict):
        raise UserError(f"{where}: text_cfg is missing; give the configuration of an open_clip model")
    for key, values in _COMPUTED.items():
        if text.get(key) not in values:
            reason = "a causal mask" if key == "no_causal_mask" else f"{key} {text.get(key)!r}"
            raise UserError(
                f"{where}: a text tower with {reason} is not supported; give one of SigLIP or SigLIP 2"
            )
    if model.get("quick_gelu"):
        raise UserError(
            f"{where}: a text tower with QuickGELU is not supported; give one of SigLIP or SigLIP 2"
        )
    with open_safetensors(path) as file:
        table = file.take(f"{_PREFIX}token_embedding.weight", None, None)
        width = table.shape[1]
        names = BLOCKS._replace(block=_PREFIX + BLOCKS.block)
        params = {
            "Embed_0": {"embedding": table},
            "pos_embedding": file.take(f"{_PREFIX}positional_embedding", None, width)[None],
            "Encoder_0": {
                "encoderblock": blocks(file, names, width, text.get("heads", 8)),
                "encoder_norm": norm(file, f"{_PREFIX}ln_final", width),
            },
            "head": _head(file, width),
        }
        pairs = {"t": "logit_scale", "b": "logit_bias"}
        loss = {name: file.take(key) for name, key in pairs.items() if key in file.shapes}
        file.refuse_unused(re.compile(r"visual\..*|text\.attn_mask").fullmatch)
    return params, loss


def _head(file: WeightsFile, width: int) -> dict[str, np.ndarray]:
    name = f"{_PREFIX}text_projection"
    if name not in file.shapes:
        return dense(file, name, width, None)
    kernel = file.take(name, width, None)  # without bias
    return {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)}
