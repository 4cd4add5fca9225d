"""The layouts in which public vision towers are stored, each with its own preprocessing.

To add a family of transformers: a row in `FAMILIES` of `lit_fast/weights/huggingface.py` and, if its image processor
is new, a row in `PROCESSORS` of `lit_fast/towers/preprocess_config.py`. To add a layout: a module in
`lit_fast/weights/` that returns `Weights`, and a branch in `load_layout`.

If the block of the family differs from that of `lit_fast.models.vit`, add a field to `Architecture` in
`lit_fast.models.architecture` (with `parameters` and `flops_per_image`), its computation to `vit` or `transformer`, and
the field to `Tower.provenance` and `from_provenance`. Each module of `lit_fast/train/export/` must refuse a field that
its format cannot express.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lit_fast.storage.files import read_object
from lit_fast.storage.paths import join, parent, suffix
from lit_fast.towers import preprocess_config
from lit_fast.towers.preprocess import Preprocess
from lit_fast.weights.huggingface import load_huggingface
from lit_fast.weights.npz import load_npz
from lit_fast.weights.parameters import Weights
from lit_fast.weights.timm import load_timm

PreprocessAt = Callable[[int | None], Preprocess]
"""The preprocessing that a tower was published with, at a resolution in pixels or, for None, at its own."""


def load_layout(path: str) -> tuple[Weights, PreprocessAt]:
    """Load the weights of a vision tower from a `.npz`, or in timm's or transformers' layout.

    Raises:
      UserError: the file or the config.json beside it is missing or damaged, or describes another model.
    """
    if suffix(path) == ".npz":
        return _load_big_vision(path)
    where = join(parent(path), "config.json")
    config = read_object(where)
    if "architecture" in config and isinstance(config.get("pretrained_cfg"), dict):
        return _load_timm(path, config, where)
    return _load_huggingface(path, config, where)


def _load_big_vision(path: str) -> tuple[Weights, PreprocessAt]:
    weights = load_npz(path)
    trained = weights.architecture.patch * math.isqrt(weights.params["pos_embedding"].shape[1])

    def preprocess(resolution: int | None) -> Preprocess:
        size = resolution or trained
        if "MAPHead_0" in weights.params:
            return Preprocess("tf-squash", size, size)
        return Preprocess("pil-crop", size, math.floor(size / (1.0 if size >= 384 else 0.9)))

    return weights, preprocess


def _load_timm(path: str, config: dict[str, Any], where: str) -> tuple[Weights, PreprocessAt]:
    def preprocess(resolution: int | None) -> Preprocess:
        size = {"input_size": [3, resolution, resolution]} if resolution else {}
        return preprocess_config.timm(config["pretrained_cfg"] | size, where)

    return load_timm(path, config, where), preprocess


def _load_huggingface(path: str, config: dict[str, Any], where: str) -> tuple[Weights, PreprocessAt]:
    weights = load_huggingface(path, config, where)
    file = join(parent(path), "preprocessor_config.json")
    published = preprocess_config.huggingface(read_object(file), file)

    def preprocess(resolution: int | None) -> Preprocess:
        size = resolution or published.size
        return replace(published, size=size, resize=published.resize * size // published.size)

    return weights, preprocess
