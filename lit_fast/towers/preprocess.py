"""From the bytes of an image file to the uint8 pixels that a vision tower expects.

Weights come with a convention of resizing and cropping; the methods below are those of the families that
publish towers. Normalisation by mean and std happens on the device.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image

from lit_fast.data.images.decode import ImageError, full_size

METHODS = ("pil-crop", "pil-squash", "hf-crop", "tf-squash")
INTERPOLATIONS = {f.name.lower(): f for f in Image.Resampling}

# `decode` has its own cap, checked before any pixel is decoded; PIL's would print warnings below its limit
# and forbid a higher one.
Image.MAX_IMAGE_PIXELS = None

# Of odd tags and palettes PIL warns; in millions of pictures from the web there are always some.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

# A 1 x 30 000 pixel image has few pixels, but resized to a short side of 248 it has 1.8 thousand million.
_MAX_RESIZED_PIXELS = 64_000_000

# Random-resized crops of `view`: share of the area, and sides at most 4:3.
_VIEW_AREA = 0.35
_VIEW_RATIO = 4 / 3

# Short side of a reduced JPEG, as a multiple of the side that it is resized to.
_REDUCED = 2


@dataclass(frozen=True)
class Preprocess:
    """How images become a tower's input.

    Equal pixel for pixel to the processors named here where those resize with PIL. The `Pil` processors of
    transformers 5 are the definition of the Hugging Face families, as their models were published with
    them; those that resize tensors with torchvision differ by one grey level in 0.2 to 0.4 % of the values
    (measured on two photos of 640 x 427 reduced to 224).

    Attributes:
      method: "pil-crop": short side to `resize`, then the centre `size` x `size`, its corner rounded half to
        even (torchvision; timm's crop mode "center").
        "pil-squash": both sides to `resize`, the aspect ratio is lost; then the centre as above (Hugging
        Face ViT, DeiT and SigLIP; timm's "squash").
        "hf-crop": as "pil-crop", but the corner is rounded down and what lies outside of the image is black
        (Hugging Face CLIP and DINOv2).
        "tf-squash": both sides to `size`, not antialiased (big_vision).
      size: height and width of the result, pixels.
      resize: short side, or both, before the crop, pixels; `size` for tf-squash.
      mean: per channel, of pixels scaled to [0, 1]; subtracted on the device.
      std: per channel, divided by on the device.
      interpolation: filter of PIL's antialiased resize, a key of `INTERPOLATIONS`; "" is "bicubic". Always
        "bilinear" for tf-squash.
      reduced: JPEGs much larger than needed are decoded at 1/2, 1/4 or 1/8 (see `at_least`).
      alpha: what becomes of transparency: "drop" leaves the colours as they are (timm, torchvision, big_vision),
        "white" lays the picture on white (Hugging Face CLIP, SigLIP and DINOv2).

    Raises:
      ValueError: there is no such method or filter, or a number makes no sense.
    """

    method: str
    size: int
    resize: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = ""
    reduced: bool = False
    alpha: str = "drop"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"preprocess method {self.method!r}; there are {', '.join(METHODS)}")
        if self.alpha not in ("drop", "white"):
            raise ValueError(f"alpha {self.alpha!r}; there are drop, white")
        own = _interpolation(self.method)
        if self.interpolation not in ("", *INTERPOLATIONS):
            raise ValueError(f"interpolation {self.interpolation!r}; there are {', '.join(INTERPOLATIONS)}")
        if self.method == "tf-squash" and self.interpolation not in ("", own):
            raise ValueError(f"tf-squash is {own}; interpolation {self.interpolation} needs pil-squash")
        if self.method == "tf-squash" and self.reduced:
            raise ValueError("tf-squash samples single pixels, so JPEGs cannot be decoded reduced for it")
        for name, value in (("size", self.size), ("resize", self.resize)):
            if type(value) is not int or value < 1 or value * value > _MAX_RESIZED_PIXELS:
                raise ValueError(f"preprocess: {name} is {value!r}, not a number of pixels")
        if self.resize < self.size and self.method != "hf-crop":  # which pads
            raise ValueError(f"preprocess: resize {self.resize} is smaller than size {self.size}")
        for name, values, least in (("mean", self.mean, -math.inf), ("std", self.std, 0)):
            if len(values) != 3 or not all(math.isfinite(v) and v > least for v in values):
                raise ValueError(f"preprocess: {name} is {list(values)}, not three sensible numbers")
        # One meaning must have one spelling.
        object.__setattr__(self, "interpolation", self.interpolation or own)
        if self.method == "tf-squash":  # there is no crop
            object.__setattr__(self, "resize", self.size)

    @property
    def at_least(self) -> int | None:
        """Short side in pixels that `decode` has to leave a JPEG; None: all of it.

        Twice the side that it is resized to. Cosine of ViT-Ti/16's features with those of exact decoding,
        mean and least: at twice 0.9992 and 0.9979, at once 0.992 and 0.971 (9 and 15 pictures of 400 to 1411
        pixels, features at 112); on 160 photos of 224 pixels with features at 48, at twice 0.998 and 0.958.
        tf-squash, which samples single pixels, falls to 0.94 and 0.82 there, so it has no reduced decoding.
        """
        return _REDUCED * max(self.resize, self.size) if self.reduced else None

    def apply(self, image: Image.Image) -> np.ndarray:
        """An RGB image as uint8 `[size, size, 3]`.

        Raises:
          ImageError: the image is too long and thin to be resized.
        """
        if self.method == "tf-squash":
            return tf_squash(np.asarray(image), self.size)
        # Of a reduced JPEG the last row and column cover only a part of a pixel.
        full, box = full_size(image)
        new = (self.resize, self.resize) if self.method == "pil-squash" else self._resized(*full)
        if new != image.size or box:
            image = image.resize(new, INTERPOLATIONS[self.interpolation], box)
        left, top = (self._corner(n - self.size) for n in new)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def view(self, image: Image.Image, key: str, number: int) -> np.ndarray:
        """One of many views of an RGB image as uint8 `[size, size, 3]`; view 0 is `apply`'s.

        The others are random-resized crops: 35 to 100 % of the area, sides at most 4:3, resized without
        regard to the aspect ratio (Inception's augmentation, with less cut away than for classification,
        since a caption speaks of the whole picture). Never mirrored: captions say left and right, and
        pictures hold text. The crop depends on `key` (of the row), `number` and the size of the image only.

        Raises:
          ImageError: as `apply`, view 0 only.
        """
        if number == 0:
            return self.apply(image)
        crop = image.crop(random_crop(*image.size, key, number))
        if self.method == "tf-squash":
            return tf_squash(np.asarray(crop), self.size)
        return np.asarray(crop.resize((self.size, self.size), INTERPOLATIONS[self.interpolation]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for provenance; the inverse of `from_dict`.

        A tower's identity is a digest over them, so a field younger than the first feature stores is only
        there when it is not what it was before it existed.
        """
        value = self.__dict__ | {"mean": list(self.mean), "std": list(self.std)}
        if self.interpolation == _interpolation(self.method):
            del value["interpolation"]
        if not self.reduced:
            del value["reduced"]
        if self.alpha == "drop":
            del value["alpha"]
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Preprocess:
        """Build from `to_dict`'s result, also of an earlier version."""
        return cls(**(value | {"mean": tuple(value["mean"]), "std": tuple(value["std"])}))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height when the short side is `resize`; the long one is truncated, as torchvision does."""
        short, long = min(width, height), max(width, height)
        new_long = int(self.resize * long / short)
        if self.resize * new_long > _MAX_RESIZED_PIXELS:
            raise ImageError(f"{width} x {height} pixels are too long and thin to be resized")
        return (self.resize, new_long) if width <= height else (new_long, self.resize)

    def _corner(self, gap: int) -> int:
        """Where the crop begins; torchvision rounds half to even here, as Python does."""
        return gap // 2 if self.method == "hf-crop" else round(gap / 2)


def _interpolation(method: str) -> str:
    return "bilinear" if method == "tf-squash" else "bicubic"


def random_crop(width: int, height: int, key: str, number: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of crop `number` of an image, drawn from blake2b of `key` and `number`.

    As torchvision's RandomResizedCrop: ten attempts, then the whole image cut to the allowed ratio. Only
    arithmetic that IEEE 754 defines to the last bit, so that every machine draws the same.
    """
    for attempt in range(10):
        text = f"{number} {attempt} {key}".encode("utf-8", "surrogatepass")
        words = np.frombuffer(blake2b(text, digest_size=32).digest(), "<u8")
        share, shape, x, y = (int(word >> np.uint64(11)) / 2**53 for word in words)
        area = width * height * (_VIEW_AREA + (1 - _VIEW_AREA) * share)
        # Twice the fraction says how far from square, its whole part in which direction.
        ratio = 1 + (_VIEW_RATIO - 1) * (2 * shape % 1)
        ratio = ratio if shape < 0.5 else 1 / ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _VIEW_RATIO)))
    h = min(height, max(1, round(width * _VIEW_RATIO)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def tf_squash(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 `[h, w, c]` to `[size, size, c]`: `tf.image.resize(antialias=False)`, truncated to uint8.

    Bilinear with half-pixel centres, in float32, along x and then along y, as TensorFlow computes it. An
    image that has the size already is returned unchanged.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    top, bottom, down = _taps(height, size)
    left, right, across = _taps(width, size)
    across, down = across[None, :, None], down[:, None, None]

    def row(index: np.ndarray) -> np.ndarray:
        first = image[np.ix_(index, left)].astype(np.float32)
        last = image[np.ix_(index, right)].astype(np.float32)
        return first + (last - first) * across

    upper, lower = row(top), row(bottom)
    return (upper + (lower - upper) * down).clip(0, 255).astype(np.uint8)


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source positions and the weight of the second, each `[size]`, for one axis."""
    scale = np.float32(length) / np.float32(size)
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(position)
    low = np.maximum(floor, 0).astype(np.int64)
    high = np.minimum(np.ceil(position), length - 1).astype(np.int64)
    return low, high, position - floor
