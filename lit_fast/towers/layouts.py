"""The layouts in which public vision towers are stored, each with its own preprocessing.

To add a family of transformers to lit_fast's own models: a row in `FAMILIES` of `lit_fast/weights/huggingface.py` and,
if its image processor is new, a row in `PROCESSORS` of `lit_fast/towers/preprocess_config.py`. To add a layout: a
module in `lit_fast/weights/` that returns `Weights`, and a branch in `find_files` and `load_weights`. Models without
code of lit_fast's own are computed by `lit_fast.towers.torch`.

If the block of the family differs from that of `lit_fast.models.vit`, add a field to `Architecture` in
`lit_fast.models.architecture` (with `parameters` and `flops_per_image`), its computation to `vit` or `transformer`, and
the field to `Tower.record` and `from_provenance`. Each module of `lit_fast/train/export/` must refuse a field that
its format cannot express.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from lit_fast.errors import UnsupportedModelError, UserError
from lit_fast.runs.run import read_tower
from lit_fast.storage.files import exists, is_file
from lit_fast.storage.hub import Snapshot
from lit_fast.storage.paths import join, parent, suffix
from lit_fast.storage.text_files import read_object
from lit_fast.towers import preprocess_config
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.torch import packages
from lit_fast.towers.trained import RUN_CONFIG, is_run, load_trained, recorded_preprocess
from lit_fast.utils.output import status
from lit_fast.weights.huggingface import load_huggingface
from lit_fast.weights.npz import load_npz
from lit_fast.weights.parameters import Weights
from lit_fast.weights.resolve import local_weights
from lit_fast.weights.timm import load_timm

OPEN_CLIP = "open_clip:"
_CONFIG, _OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"

PreprocessAt = Callable[[int | None], Preprocess]
"""The preprocessing that a tower was published with, at a resolution in pixels or, for None, at its own."""


class TowerFiles(NamedTuple):
    """The files of a tower.

    Attributes:
      kind: "npz", "timm", "transformers", "open_clip"; of lit_fast itself "run" or "export".
      path: a `.npz`, a `.safetensors` or the index of several; of a run its `config.toml`.
      config: content of the library's configuration; {} for npz.
      where: where it comes from, for messages.
    """

    kind: str
    path: str
    config: dict[str, Any]
    where: str


def find_files(spec: str, arch: str | None = None) -> TowerFiles:
    """Find the files of a tower, downloading them on first use.

    Args:
      spec: a path, a name of `lit_fast.weights.resolve`, or open_clip:ARCHITECTURE[/PRETRAINED].
      arch: name of the architecture of a `.safetensors`, in place of a configuration beside it: a name of timm's, or
        open_clip:ARCHITECTURE[/PRETRAINED].

    Raises:
      UserError: there is no such file or name, or the configuration is missing or damaged.
    """
    if spec.startswith(OPEN_CLIP) and not exists(spec):
        if arch:
            raise UserError(f"--arch is for a file of weights; leave it out for {spec}")
        packages.require("torchax")
        from lit_fast.towers.torch import open_clip

        repository, file = open_clip.repository_of(spec.removeprefix(OPEN_CLIP))
        path = Snapshot(repository).fetch(file)
        return TowerFiles("open_clip", path, open_clip.config_of(spec.removeprefix(OPEN_CLIP)), spec)
    if is_run(spec):
        if arch:
            raise UserError(f"--arch is for .safetensors; leave it out for {spec}")
        return TowerFiles("run", join(spec, RUN_CONFIG), read_tower(spec), join(spec, "tower.json"))
    path = _local_weights(spec)
    if arch:
        return _with_architecture(path, arch)
    if suffix(path) == ".npz":
        return TowerFiles("npz", path, {}, path)
    where, other = join(parent(path), _CONFIG), join(parent(path), _OPEN_CLIP_CONFIG)
    if is_file(other) and not is_file(where):
        return TowerFiles("open_clip", path, read_object(other), other)
    if not is_file(where):
        raise UserError(
            f"{path} has no {_CONFIG} beside it; put it there, or name the architecture: --arch NAME, "
            f"--arch {OPEN_CLIP}NAME"
        )
    config = read_object(where)
    if config.get("format") == "lit_fast":
        return TowerFiles("export", path, read_tower(parent(path)), join(parent(path), "tower.json"))
    if "architecture" in config and isinstance(config.get("pretrained_cfg"), dict):
        return TowerFiles("timm", path, config, where)
    return TowerFiles("transformers", path, config, where)


def load_weights(files: TowerFiles) -> Weights:
    """Load the weights of a vision tower for lit_fast's own ViT.

    Raises:
      UnsupportedModelError: it is another kind of model.
      UserError: a file is damaged.
    """
    if files.kind == "npz":
        return load_npz(files.path)
    if files.kind in ("run", "export"):
        return load_trained(files.kind, parent(files.path), files.config)
    if files.kind == "timm":
        return load_timm(files.path, files.config, files.where)
    if files.kind == "transformers":
        return load_huggingface(files.path, files.config, files.where)
    raise UnsupportedModelError(
        f"{files.where}: open_clip's models have no code of lit_fast's own; use --backend torch"
    )


def published_preprocess(
    files: TowerFiles, weights: Weights | None, method: str | None = None
) -> PreprocessAt:
    """Return the preprocessing that a tower was published with.

    Args:
      files: those of the tower.
      weights: needed for npz.
      method: replaces a published method that cannot be expressed.
    """
    if files.kind == "npz":
        assert weights is not None
        return _big_vision(weights)
    if files.kind == "timm":
        return lambda resolution: preprocess_config.timm(
            files.config["pretrained_cfg"]
            | ({"input_size": [3, resolution, resolution]} if resolution else {}),
            files.where,
            method,
        )
    if files.kind == "open_clip":
        return lambda resolution: preprocess_config.open_clip(files.config, files.where, resolution)
    if files.kind in ("run", "export"):
        published = recorded_preprocess(files.config, files.where)
    else:
        file = join(parent(files.path), "preprocessor_config.json")
        published = preprocess_config.huggingface(read_object(file), file, method)

    def preprocess(resolution: int | None) -> Preprocess:
        size = resolution or published.size
        return replace(published, size=size, resize=published.resize * size // published.size)

    return preprocess


def _big_vision(weights: Weights) -> PreprocessAt:
    trained = weights.architecture.patch * math.isqrt(weights.params["pos_embedding"].shape[1])

    def preprocess(resolution: int | None) -> Preprocess:
        size = resolution or trained
        if "MAPHead_0" in weights.params:
            return Preprocess("tf-squash", size, size)
        return Preprocess("pil-crop", size, math.floor(size / (1.0 if size >= 384 else 0.9)))

    return preprocess


def _local_weights(spec: str) -> str:
    """Return the weights of a path or name; names of timm may be of models whose repository has another name."""
    try:
        return local_weights(spec)
    except UserError:
        if not spec.startswith("timm:") or not packages.installed("torchax"):
            raise
        from lit_fast.towers.torch import timm

        name = spec.removeprefix("timm:")
        repository = timm.repository_of(name)
        if repository in ("", f"timm/{name}"):
            raise
        return local_weights(f"hf:{repository}")


def _with_architecture(path: str, arch: str) -> TowerFiles:
    if suffix(path) == ".npz":
        raise UserError(f"--arch is for .safetensors; leave it out for {path}")
    packages.require("torchax")
    where = f"--arch {arch}"
    if arch.startswith(OPEN_CLIP):
        from lit_fast.towers.torch import open_clip

        return TowerFiles("open_clip", path, open_clip.config_of(arch.removeprefix(OPEN_CLIP)), where)
    from lit_fast.towers.torch import timm

    name = arch.removeprefix("timm:")
    if alike := timm.padded_alike(name):
        status(
            f"note: weights of {alike}, which pads otherwise, fit {name} too; give --arch {alike} if they are its"
        )
    return TowerFiles("timm", path, timm.config_of(name), where)
