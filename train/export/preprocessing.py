"""Express a tower's preprocessing in the configs of open_clip and transformers.

Notes for the model card name the differences. open_clip resizes PIL images with torchvision, transformers with PIL or
as tensors; all of them antialias.
"""

from __future__ import annotations

from typing import Any

from lit_fast.errors import UserError
from lit_fast.towers.preprocess import INTERPOLATIONS, Preprocess

_OPEN_CLIP_FILTERS = ("bilinear", "bicubic")

_ANTIALIASED = (
    "Images that are not {size} x {size} pixels are resized with antialiasing, which lit_fast's tf-squash (that of "
    "big_vision) does not do: their embeddings differ somewhat."
)
_ZOOMED = (
    "The tower was trained on the centre {size} pixels of an image resized to {resize}. open_clip can only resize to "
    "{size}, so the model sees more of each image here: embeddings and figures differ somewhat from those of the run. "
    "Pixels resized to {resize} and cropped to {size} give the same embeddings as the run."
)
_FILTERED = (
    "Images are resized with {interpolation}, for training with {own}: their embeddings differ somewhat."
)
_DECODED = (
    "Large JPEGs are decoded at full size here, for training at a fraction: their embeddings differ slightly."
)
_TRANSPARENT = "Transparent images are drawn on another background than for training."
_TENSORS = (
    'Without backend="pil" transformers resizes with torchvision if that is installed; a few pixels then differ by '
    "one grey level."
)
_CORNER = "If a centre crop cannot be even, it may be one pixel beside lit_fast's."


def check_open_clip_preprocess(preprocess: Preprocess, other: str) -> None:
    """Raise UserError, which names another format, if open_clip would crop or filter images differently."""
    p = preprocess
    if p.resize != p.size:
        raise UserError(
            f"the tower's preprocessing resizes to {p.resize} pixels and crops to {p.size}, which open_clip cannot; "
            f"export with --format {other}, embed with --preprocess pil-squash or tf-squash, or accept other "
            "pixels: --nearest-pixels"
        )
    if p.interpolation not in _OPEN_CLIP_FILTERS:
        raise UserError(
            f"the tower's preprocessing resizes with {p.interpolation}, open_clip only with bilinear or bicubic; "
            f"export with --format {other}, or accept other pixels: --nearest-pixels"
        )


def open_clip_preprocess(preprocess: Preprocess) -> tuple[dict[str, Any], list[str]]:
    """Return open_clip's `preprocess_cfg` and notes on the differences."""
    p = preprocess
    config = {
        "size": p.size,
        "mode": "RGB",
        "mean": list(p.mean),
        "std": list(p.std),
        "interpolation": p.interpolation if p.interpolation in _OPEN_CLIP_FILTERS else "bicubic",
        "resize_mode": "squash" if "squash" in p.method else "shortest",
    }
    notes = [_ZOOMED.format(size=p.size, resize=p.resize)] if p.resize != p.size else []
    if p.interpolation != config["interpolation"]:
        notes.append(_FILTERED.format(interpolation=config["interpolation"], own=p.interpolation))
    return config, notes + _differences(p, uneven_crop=p.method == "hf-crop", alpha="drop")


def image_processor(preprocess: Preprocess) -> tuple[dict[str, Any], list[str]]:
    """Return transformers' `preprocessor_config.json` and notes on the differences."""
    p = preprocess
    square = {"height": p.resize, "width": p.resize}
    config = {
        "image_processor_type": "CLIPImageProcessor",  # has all steps, and applies those that are named
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if "squash" in p.method else {"shortest_edge": p.resize},
        "resample": int(INTERPOLATIONS[p.interpolation]),
        "do_center_crop": True,
        "crop_size": {"height": p.size, "width": p.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }
    uneven_crop = p.method == "pil-crop" or (p.resize - p.size) % 2 == 1
    return config, [_TENSORS, *_differences(p, uneven_crop=uneven_crop, alpha="white")]


def _differences(p: Preprocess, *, uneven_crop: bool, alpha: str) -> list[str]:
    """List the notes that apply.

    Args:
      p: the tower's preprocessing.
      uneven_crop: centre crops may differ by one pixel.
      alpha: the other code base's rule for transparent images.
    """
    notes = {
        _ANTIALIASED.format(size=p.size): p.method == "tf-squash",
        _CORNER: uneven_crop,
        _DECODED: p.reduced,
        _TRANSPARENT: p.alpha != alpha,
    }
    return [note for note, applies in notes.items() if applies]
