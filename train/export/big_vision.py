"""Export as big_vision's `.npz` of two towers (models/proj/image_text/two_towers.py).

    model.npz        params/img/..., params/txt/..., params/t and, with the sigmoid loss, params/b, float32
    tokenizer.model  sentencepiece
    README.md        model card, with the configuration that loads it

Blocks are stored one by one, as big_vision's text tower wants them. Subtracting the mean feature, and the image
head, become the image tower's own `head`: (f - mean) W = f W - mean W, and its scale is lost in normalising.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lit_fast.config import TextConfig
from lit_fast.errors import UserError
from lit_fast.inference.model import Model
from lit_fast.models.architecture import Architecture
from lit_fast.models.text_tower import EPSILON
from lit_fast.train.export.card import model_card, rounding

WEIGHTS = "model.npz"

_USE = """\
With [big_vision](https://github.com/google-research/big_vision) in the path:

```python
import ml_collections
from big_vision.models.proj.image_text import two_towers

config = ml_collections.ConfigDict(dict(
    image_model="vit", text_model="proj.image_text.text_transformer",
    image={image},
    text={text},
    out_dim={out_dim}, temperature_init=10.0{bias},
))
params = two_towers.load(None, "./model.npz", config)
model = two_towers.Model(**config)
images, texts, extra = model.apply({{"params": params}}, pixels, ids)  # {extra}
```

`pixels`: float32 [n, {size}, {size}, 3], made by `{method}` (`lit_fast.towers`), less {mean}, divided by {std}.
`ids`: int32 [m, {length}]: `tokenize(max_len={length}, eos="sticky", pad_value={pad}, model="tokenizer.model")`.

Back into lit_fast: `lit-fast embed D --tower model.npz {options}`, and
`--text.init model.npz:txt` with `lit-fast tokenize D --tokenizer tokenizer.model --max-length {length}{padding}`.
"""


def check(model: Model) -> None:
    """Raises UserError where big_vision has no such tower."""
    wrong = [*_text_reasons(model.config), *_vision_reasons(model.tower.architecture)]
    if wrong:
        raise UserError(
            f"big_vision cannot express this model: {'; '.join(wrong)}; --format lit_fast and onnx can"
        )


def write(model: Model, folder: Path) -> None:
    """Write the files into an empty folder."""
    np.savez(folder / WEIGHTS, allow_pickle=False, **arrays(model))
    (folder / "tokenizer.model").write_bytes(model.tokenizer.model)
    (folder / "README.md").write_text(
        model_card(model, _use(model), _notes(model), library="big_vision"), encoding="utf-8"
    )


def arrays(model: Model) -> dict[str, np.ndarray]:
    """All parameters by name, float32."""
    text = dict(model.params["txt"])
    if "embedding_projection" in text:  # the same vectors, without the bottleneck
        narrow, projection = text["Embed_0"]["embedding"], text.pop("embedding_projection")["kernel"]
        text["Embed_0"] = {"embedding": narrow @ projection}
    tree = {"img": model.tower.params | _image_head(model), "txt": text}
    tree |= {name: model.params[name] for name in ("t", "b") if name in model.params}
    out: dict[str, np.ndarray] = {}
    for name, array in flatten_dict(tree, sep="/").items():
        before, block, after = f"params/{name}".partition("/encoderblock/")
        if block:
            out |= {f"{before}/encoderblock_{i}/{after}": layer for i, layer in enumerate(array)}
        else:
            out[before] = array
    return out


def _image_head(model: Model) -> dict[str, Any]:
    """big_vision's `head` of the image tower; none where features are embeddings as they are."""
    mean = model.params["mean"]
    if "img" not in model.params and not mean.any():
        return {}
    kernel = (
        model.params["img"]["head"]["kernel"]
        if "img" in model.params
        else np.eye(len(mean), dtype=np.float32)
    )
    return {"head": {"kernel": kernel, "bias": -mean @ kernel}}


def _text_reasons(config: TextConfig) -> list[str]:
    return ["its text tower attends to padding (text.mask_padding = true)"] if config.mask_padding else []


def _vision_reasons(a: Architecture) -> list[str]:
    """What big_vision's ViT does not have; the kind of GELU is a matter of degree, see `_notes`."""
    found = {
        f"its image tower has no {a.gelu} activation": a.gelu not in ("tanh", "exact"),
        "its image tower has no register tokens": a.registers > 0,
        "its image tower has no LayerNorm before the first block": a.pre_norm,
        "its image tower has no LayerNorm after pooling": a.norm_after_pool,
        f"its image tower has no pooling {a.pool!r} beside a class token": a.class_token and a.pool != "tok",
        f"the epsilon of its LayerNorm is {EPSILON}, not {a.epsilon}": a.epsilon != EPSILON,
    }
    return [reason for reason, true in found.items() if true]


def _notes(model: Model) -> list[str]:
    """What is not the same after the export."""
    notes = [rounding(model)]
    if model.tower.architecture.gelu == "exact":
        notes.append(
            "big_vision computes GELU by its tanh approximation, these features were made with the exact one (they "
            "differ by less than 5e-4 per activation): features and scores differ slightly"
        )
    if model.config.embedding_width:
        notes.append(
            "the token table and its projection are multiplied out, which is exact up to float32 rounding"
        )
    return notes


def _use(model: Model) -> str:
    a, shape, how = model.tower.architecture, model.config.shape, model.tower.preprocess
    image = a.shape._asdict() | {"patch_size": (a.patch, a.patch), "pool_type": a.pool}
    text = shape._asdict() | {"vocab_size": model.tokenizer.vocab_size, "pool_type": model.config.pooling}
    size = how.size
    for tower in (image, text):
        tower["num_heads"] = tower.pop("heads")
    options = f"--preprocess {how.method} --gelu {a.gelu} --resolution {size}"
    pad = model.tokenizer.pad_id
    # big_vision looks for a bias in the file wherever the configuration has this key, whatever its value.
    bias = f", bias_init={float(model.params['b'][0])}" if "b" in model.params else ""
    return _USE.format(
        image=f"dict({', '.join(f'{k}={v!r}' for k, v in image.items())})",
        text=f"dict({', '.join(f'{k}={v!r}' for k, v in text.items())})",
        out_dim=(model.width if _image_head(model) else None, model.width if model.config.head else None),
        bias=bias,
        extra='extra["t"], extra["b"]' if bias else 'extra["t"]',
        size=size,
        method=how.method,
        mean=how.mean,
        std=how.std,
        length=model.tokenizer.max_length,
        pad=pad,
        padding="" if pad == model.tokenizer.eos_id else f" --pad-id {pad}",
        options=options,
    )
