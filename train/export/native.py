"""Export as a folder that `lit_fast.load` reads; see `lit_fast.inference.exported` for its files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from lit_fast.inference.exported import (
    CARD,
    CONFIG,
    FORMAT,
    LOSS_KEYS,
    RECEIPT,
    TEXT_KEYS,
    TOKENIZER,
    TOWER,
    VERSION,
    WEIGHTS,
)
from lit_fast.inference.model import Model
from lit_fast.storage.files import json_bytes
from lit_fast.train.export.card import model_card

_USE = """\
`pip install lit-fast`, then:

```python
import lit_fast

model = lit_fast.load(".")  # this folder; of the Hub: huggingface_hub.snapshot_download("OWNER/NAME")
images = model.embed_image(["image.jpg"])  # float32 [1, {width}], of unit length
texts = model.embed_text(["a dog", "a flower"])  # float32 [2, {width}]
scores = model.score(["image.jpg"], ["a dog", "a flower"])  # float32 [1, 2]
```
"""


def check(model: Model) -> None:
    """Raises UserError where the vision tower's weights are not to be had."""
    _ = model.tower


def write(model: Model, folder: Path) -> None:
    """Write the files of `lit_fast.inference.exported` into an empty folder."""
    vision = {f"img/{name}": array for name, array in flatten_dict(model.tower.params, sep="/").items()}
    arrays = flatten_dict(model.params, sep="/") | vision
    # The library writes a transposed array's memory as it lies, which is another array.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, folder / WEIGHTS, {"format": FORMAT})
    (folder / TOKENIZER).write_bytes(model.tokenizer.model)
    (folder / CONFIG).write_bytes(json_bytes(_config(model)))
    (folder / TOWER).write_bytes(json_bytes(_without_paths(model.tower_json)))
    if model.receipt is not None:
        (folder / RECEIPT).write_bytes(json_bytes(_without_paths(model.receipt)))
    card = model_card(model, _USE.format(width=model.width))
    (folder / CARD).write_text(card, encoding="utf-8")


def _config(model: Model) -> dict[str, Any]:
    text = asdict(model.config) | model.config.shape._asdict()
    loss = asdict(model.loss)
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": model.step,
        "average": model.average,
        "text": {key: text[key] for key in TEXT_KEYS},
        "loss": {key: loss[key] for key in LOSS_KEYS},
        "tokenizer": {
            "max_length": model.tokenizer.max_length,
            "pad_id": model.tokenizer.pad_id,
            "identity": model.tokenizer.identity,
        },
    }


def _without_paths(value: Any) -> Any:
    """JSON with the last part alone of every path: whose machine it was is nobody's business."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value
