"""Read preprocessing from the configurations of published weights.

A configuration is followed exactly. One that `Preprocess` cannot express is refused, as other pixels give other
features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from PIL import Image

from lit_fast.errors import UserError
from lit_fast.towers.preprocess import INTERPOLATIONS, Preprocess

Triple = tuple[float, float, float]

_HALF = (0.5, 0.5, 0.5)
_IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPENAI: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# Defaults of transformers 5, models/*/image_processing_pil_*.py; if `square`, a number as size is both sides of a
# square, else the short side. DINOv3 has a processor for torchvision only, which does not round the resized pixels
# to 8 bits.
_SQUARE_224 = {"height": 224, "width": 224}
_COMMON: dict[str, Any] = {
    "resample": 3, "image_mean": _HALF, "image_std": _HALF, "square": True, "do_convert_rgb": False,
}  # fmt: skip
_KEYS = ("image_mean", "image_std")
_SHORT: dict[str, Any] = _COMMON | {
    "square": False,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": _OPENAI[0],
    "image_std": _OPENAI[1],
    "do_convert_rgb": True,
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": _COMMON | {"size": _SQUARE_224, "resample": 2},
    "DeiT": _COMMON | {"size": 256, "do_center_crop": True, "crop_size": 224},
    "Siglip": _COMMON | {"size": _SQUARE_224, "square": False, "do_convert_rgb": True},
    "CLIP": _SHORT,
    "Bit": _SHORT,
    "DINOv3ViT": _COMMON | {"size": _SQUARE_224, "resample": 2} | dict(zip(_KEYS, _IMAGENET, strict=True)),
    "Beit": _COMMON | {"size": _SQUARE_224, "crop_size": _SQUARE_224},
    "ConvNext": _COMMON | {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "square": False},
}
_SUFFIXES = ("ImageProcessorPil", "ImageProcessorFast", "ImageProcessor", "FeatureExtractor")


def huggingface(config: dict[str, Any], path: str, method: str | None = None) -> Preprocess:
    """Convert the content of a `preprocessor_config.json`; `path` is for messages.

    Known are the processors in `PROCESSORS`, with old and new names of keys. A rescale factor other than 1/255 is
    included in mean and std. A configuration that cannot be expressed is read for its size, mean and std only, if
    there is a `method` of `Preprocess` to use instead.

    Raises:
      UserError: it is another processor, or a transform cannot be expressed.
    """
    with _naming(path):
        name = config.get("image_processor_type") or config.get("feature_extractor_type")
        suffix = next((s for s in _SUFFIXES if isinstance(name, str) and name.endswith(s)), "")
        known = PROCESSORS.get(name.removesuffix(suffix)) if suffix and isinstance(name, str) else None
        if known is None and method:
            return _with_method(method, config, config.get("crop_size") or config.get("size"))
        if known is None:
            raise ValueError(f"image processor {name!r} is not one of {', '.join(PROCESSORS)}")
        settings = known | {k: v for k, v in config.items() if v is not None}
        for key in ("do_pad", "do_flip_channel_order", "do_rescale_offset", "rescale_offset"):
            if settings.get(key):
                raise ValueError(f"{key} is not supported")
        if not settings.get("do_resize", True):
            raise ValueError("do_resize is false, but all images must get one size")
        if "crop_pct" in known:
            return _convnext(settings)
        method, resize = _size(settings["size"], known["square"])
        size = _side(settings.get("crop_size"), "crop_size") if settings.get("do_center_crop") else resize
        if method == "hf-crop" and not settings.get("do_center_crop"):
            raise ValueError("short side without centre crop: the images would not be square")
        if method == "pil-squash" and (resize < size or (resize - size) // 2 != round((resize - size) / 2)):
            raise ValueError(f"a centre crop of {size} out of {resize} x {resize} pixels is not supported")
        mean, std = _normalization(settings)
        preprocess = Preprocess(method, size, resize, mean, std, _filter(settings["resample"]))
        return replace(preprocess, alpha="white" if settings["do_convert_rgb"] else "drop")


def timm(pretrained_cfg: dict[str, Any], path: str, method: str | None = None) -> Preprocess:
    """Convert timm's `pretrained_cfg` to the preprocessing of timm's evaluation; `path` is for messages.

    The short side, or both for the crop mode "squash", becomes `floor(size / crop_pct)` (timm/data/config.py and
    transforms_factory.py). The crop mode "border" and fractions above 1 are refused, unless there is a `method` of
    `Preprocess` to use instead.

    Raises:
      UserError: a transform cannot be expressed.
    """
    with _naming(path):
        settings = {k: v for k, v in pretrained_cfg.items() if v}  # timm takes its default for falsy values
        shape = settings.get("input_size", (3, 224, 224))
        if not isinstance(shape, list | tuple) or len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
            raise ValueError(f"input_size {shape!r} is not that of square RGB images")
        fraction, mode = settings.get("crop_pct", 0.875), settings.get("crop_mode", "center")
        if method and (mode not in ("center", "squash") or not _is_number(fraction) or fraction > 1):
            size = _pixels(shape[1], "input_size")
            mean, std = (
                _triple(settings.get(k, d), k) for k, d in zip(("mean", "std"), _IMAGENET, strict=True)
            )
            return Preprocess(method, size, size, mean, std)
        if not _is_number(fraction) or not 0.1 <= fraction <= 1:
            raise ValueError(f"crop_pct {fraction!r} is not a fraction")
        size = _pixels(shape[1], "input_size")
        if mode not in ("center", "squash"):
            raise ValueError(f"crop_mode {mode!r} is not 'center' or 'squash'")
        return Preprocess(
            "pil-crop" if mode == "center" else "pil-squash",
            size,
            math.floor(size / fraction),
            _triple(settings.get("mean", _IMAGENET[0]), "mean"),
            _triple(settings.get("std", _IMAGENET[1]), "std"),
            settings.get("interpolation", "bicubic"),
        )


def open_clip(config: dict[str, Any], path: str, resolution: int | None = None) -> Preprocess:
    """Convert the content of an `open_clip_config.json` to open_clip's evaluation; `path` is for messages.

    Args:
      config: `preprocess_cfg` and `model_cfg`, which has the size of the images; or the latter alone.
      path: for messages.
      resolution: pixels, in place of the published size.

    Raises:
      UserError: a transform cannot be expressed.
    """
    with _naming(path):
        vision = config.get("model_cfg", config).get("vision_cfg")
        settings = {k: v for k, v in (config.get("preprocess_cfg") or {}).items() if v is not None}
        published = settings.get("size", vision.get("image_size", 224) if isinstance(vision, dict) else 224)
        size = resolution or _side(
            published[-2:] if isinstance(published, list | tuple) else published, "size"
        )
        methods = {"shortest": "pil-crop", "squash": "pil-squash"}
        mode = settings.get("resize_mode", "shortest")
        if mode not in methods:
            raise ValueError(f"resize_mode {mode!r} is not one of {', '.join(methods)}")
        mean, std = (_triple(settings.get(k, d), k) for k, d in zip(("mean", "std"), _OPENAI, strict=True))
        return Preprocess(methods[mode], size, size, mean, std, settings.get("interpolation", "bicubic"))


def _convnext(settings: dict[str, Any]) -> Preprocess:
    """Return ConvNeXt's: below 384 pixels the centre of a larger image, from 384 on squashed."""
    size = settings["size"]
    side = _pixels(size.get("shortest_edge") if isinstance(size, dict) else size, "size")
    mean, std = _normalization(settings)
    if settings.get("do_center_crop") or not _is_number(settings["crop_pct"]):
        raise ValueError("a centre crop after that of crop_pct is not supported")
    method, resize = ("pil-squash", side) if side >= 384 else ("hf-crop", int(side / settings["crop_pct"]))
    return Preprocess(method, side, resize, mean, std, _filter(settings["resample"]))


def _with_method(method: str, settings: dict[str, Any], size: Any) -> Preprocess:
    """Return a method of the user's with the size, mean and std of a configuration that cannot be expressed."""
    if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        size = size["shortest_edge"]
    side = _side(size, "size")
    given = {key: settings[key] for key in settings if settings[key] is not None}
    mean, std = _normalization({"image_mean": _IMAGENET[0], "image_std": _IMAGENET[1]} | given)
    return Preprocess(method, side, side, mean, std)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Add the file and the action to the message of a value that cannot be used."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; give --preprocess") from None


def _size(value: Any, square: bool) -> tuple[str, int]:
    """Return the method and its `resize` for any form of `size`."""
    if isinstance(value, dict) and value.keys() == {"shortest_edge"}:
        return "hf-crop", _pixels(value["shortest_edge"], "size")
    if isinstance(value, int) and not square:
        return "hf-crop", _pixels(value, "size")
    return "pil-squash", _side(value, "size")


def _side(value: Any, name: str) -> int:
    """Return the side of a square given as 224, [224, 224] or {"height": 224, "width": 224}."""
    if isinstance(value, dict) and value.keys() == {"height", "width"}:
        value = [value["height"], value["width"]]
    sides = value if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or sides[0] != sides[-1]:
        raise ValueError(f"{name} {value!r} is not the side of a square")
    return _pixels(sides[0], name)


def _pixels(value: Any, name: str) -> int:
    if type(value) is not int:
        raise ValueError(f"{name} {value!r} is not a number of pixels")
    return value


def _filter(value: Any) -> str:
    if type(value) is not int or value not in INTERPOLATIONS.values():
        raise ValueError(f"resample {value!r} is not one of PIL's filters")
    return Image.Resampling(value).name.lower()


def _normalization(settings: dict[str, Any]) -> tuple[Triple, Triple]:
    """Return mean and std for pixels in [0, 1], with `rescale_factor` included."""
    normalize = settings.get("do_normalize", True)
    mean = _triple(settings["image_mean"] if normalize else 0, "image_mean")
    std = _triple(settings["image_std"] if normalize else 1, "image_std")
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    if not _is_number(factor) or factor <= 0:
        raise ValueError(f"rescale_factor {factor!r} is not a positive number")
    if math.isclose(factor, 1 / 255, rel_tol=1e-6):
        return mean, std
    scale = 255 * factor
    return _triple([m / scale for m in mean], "image_mean"), _triple([s / scale for s in std], "image_std")


def _triple(value: Any, name: str) -> Triple:
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(_is_number(v) for v in values):
        raise ValueError(f"{name} {value!r} is not a number per channel")
    return float(values[0]), float(values[1]), float(values[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
