"""The layouts in which public vision towers are stored, each with its own preprocessing: the table `LAYOUTS`.

To add a family of transformers: a row in `FAMILIES` of `lit_fast/weights/huggingface.py` and, if its image processor
is new, a row in `PROCESSORS` of `lit_fast/towers/preprocess_config.py`. To add a layout: a module in
`lit_fast/weights/` that returns `Weights`, and a row here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Layout(NamedTuple):
    """A layout of files.

    Attributes:
      matches: whether it is that of a weights file and its config.json; {} for a file without one.
      load: returns the parameters, the architecture and the preprocessing.
    """

    matches: Callable[[str, dict[str, Any]], bool]
    load: Callable[[str, dict[str, Any]], tuple[Weights, PreprocessAt]]


def load_layout(path: str) -> tuple[Weights, PreprocessAt]:
    """Load the weights of a vision tower in the first of `LAYOUTS` that matches.

    Raises:
      UserError: the file or the config.json beside it is missing or damaged, or describes something else.
    """
    config = {} if suffix(path) == ".npz" else read_object(_config_path(path))
    layout = next(layout for layout in LAYOUTS if layout.matches(path, config))
    return layout.load(path, config)


def _load_big_vision(path: str, config: dict[str, Any]) -> tuple[Weights, PreprocessAt]:
    weights = load_npz(path)
    trained = weights.architecture.patch * math.isqrt(weights.params["pos_embedding"].shape[1])

    def preprocess(resolution: int | None) -> Preprocess:
        size = resolution or trained
        if "MAPHead_0" in weights.params:
            return Preprocess("tf-squash", size, size)
        return Preprocess("pil-crop", size, math.floor(size / (1.0 if size >= 384 else 0.9)))

    return weights, preprocess


def _load_timm(path: str, config: dict[str, Any]) -> tuple[Weights, PreprocessAt]:
    where = _config_path(path)

    def preprocess(resolution: int | None) -> Preprocess:
        size = {"input_size": [3, resolution, resolution]} if resolution else {}
        return preprocess_config.timm(config["pretrained_cfg"] | size, where)

    return load_timm(path, config, where), preprocess


def _load_huggingface(path: str, config: dict[str, Any]) -> tuple[Weights, PreprocessAt]:
    weights = load_huggingface(path, config, _config_path(path))
    file = join(parent(path), "preprocessor_config.json")
    published = preprocess_config.huggingface(read_object(file), file)

    def preprocess(resolution: int | None) -> Preprocess:
        size = resolution or published.size
        return dataclasses.replace(published, size=size, resize=published.resize * size // published.size)

    return weights, preprocess


def _config_path(path: str) -> str:
    return join(parent(path), "config.json")


def _is_timm(path: str, config: dict[str, Any]) -> bool:
    return "architecture" in config and isinstance(config.get("pretrained_cfg"), dict)


LAYOUTS = (
    Layout(lambda path, config: suffix(path) == ".npz", _load_big_vision),  # also AugReg
    Layout(_is_timm, _load_timm),
    Layout(lambda path, config: True, _load_huggingface),  # which refuses unknown model types
)
