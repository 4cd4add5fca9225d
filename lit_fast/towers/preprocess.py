"""Resize and crop images to the uint8 pixels that a vision tower was trained with.

The methods are those of the code bases that publish towers. Mean and std are applied on the device.
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

# `decode` has its own limit, checked before any pixel is decoded. PIL's would print warnings and forbid a higher one.
Image.MAX_IMAGE_PIXELS = None

# PIL warns of invalid tags and palettes, which some images of the web have.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

# A 1 x 30 000 pixel image has few pixels, but 1.8e9 when its short side is resized to 248.
_MAX_RESIZED_PIXELS = 64_000_000

# Random-resized crops of `view`: share of the area, and sides at most 4:3.
_VIEW_AREA = 0.35
_VIEW_RATIO = 4 / 3

# Short side of a reduced JPEG, as a multiple of the side that it is resized to.
_REDUCED = 2


@dataclass(frozen=True)
class Preprocess:
    """A recipe of resizing and cropping.

    The pixels are equal to those of the processors named here where they resize with PIL. For Hugging Face families
    these are the `Pil` processors of transformers 5, as the models were published with them. Processors that resize
    with torchvision differ by one grey level in 0.2 to 0.4 % of the values (two photos of 640 x 427 resized to 224).

    Attributes:
      method: "pil-crop": short side to `resize`, then the centre `size` x `size`, its corner rounded half to
        even (torchvision; timm's crop mode "center").
        "pil-squash": both sides to `resize`, the aspect ratio is lost; then the centre as above (Hugging
        Face ViT, DeiT and SigLIP; timm's "squash").
        "hf-crop": as "pil-crop", but the corner is rounded down and pixels outside of the image are black
        (Hugging Face CLIP and DINOv2).
        "tf-squash": both sides to `size`, not antialiased (big_vision).
      size: height and width of the result, pixels.
      resize: short side, or both, before the crop, pixels; `size` for tf-squash.
      mean: per channel, of pixels scaled to [0, 1]; subtracted on the device.
      std: per channel, divided by on the device.
      interpolation: filter of PIL's antialiased resize, a key of `INTERPOLATIONS`; "" is "bicubic". Always
        "bilinear" for tf-squash.
      reduced: JPEGs much larger than needed are decoded at 1/2, 1/4 or 1/8 (see `at_least`).
      alpha: of transparent images: "drop" ignores it (timm, torchvision, big_vision), "white" blends with a white
        background (Hugging Face CLIP, SigLIP and DINOv2).

    Raises:
      ValueError: there is no such method or filter, or a number is out of range.
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
            raise ValueError(
                f"preprocess method {self.method!r} is unknown; choose from {', '.join(METHODS)}"
            )
        if self.alpha not in ("drop", "white"):
            raise ValueError(f"alpha {self.alpha!r} is unknown; choose from drop, white")
        default = _interpolation(self.method)
        if self.interpolation not in ("", *INTERPOLATIONS):
            raise ValueError(
                f"interpolation {self.interpolation!r} is unknown; choose from {', '.join(INTERPOLATIONS)}"
            )
        if self.method == "tf-squash" and self.interpolation not in ("", default):
            raise ValueError(f"tf-squash is {default}; for interpolation {self.interpolation} use pil-squash")
        if self.method == "tf-squash" and self.reduced:
            raise ValueError("tf-squash samples single pixels, so JPEGs cannot be decoded reduced for it")
        for name, value in (("size", self.size), ("resize", self.resize)):
            if type(value) is not int or value < 1 or value * value > _MAX_RESIZED_PIXELS:
                raise ValueError(f"preprocess: {name} is {value!r}, not a number of pixels")
        if self.resize < self.size and self.method != "hf-crop":  # which pads
            raise ValueError(f"preprocess: resize {self.resize} is smaller than size {self.size}")
        for name, values, least in (("mean", self.mean, -math.inf), ("std", self.std, 0)):
            if len(values) != 3 or not all(math.isfinite(v) and v > least for v in values):
                raise ValueError(f"preprocess: {name} is {list(values)}, not three numbers in range")
        # Equal recipes must be equal, as they are part of a tower's identity.
        object.__setattr__(self, "interpolation", self.interpolation or default)
        if self.method == "tf-squash":  # there is no crop
            object.__setattr__(self, "resize", self.size)

    @property
    def at_least(self) -> int | None:
        """Return the short side in pixels that a reduced JPEG must keep; None: no reduction.

        It is twice the side after resizing. The cosine of ViT-Ti/16's features with those of exact decoding, mean and
        minimum, is 0.9992 and 0.9979 with a factor of 2, and 0.992 and 0.971 with a factor of 1 (images of 400 to
        1411 pixels, features at 112 pixels). On 160 photos of 224 pixels with features at 48 pixels it is 0.998 and
        0.958 with a factor of 2. tf-squash samples single pixels and falls to 0.94 and 0.82 there, so that it has no
        reduced decoding.
        """
        return _REDUCED * max(self.resize, self.size) if self.reduced else None

    def apply(self, image: Image.Image) -> np.ndarray:
        """Resize and crop an RGB image; returns uint8 [size, size, 3].

        Raises:
          ImageError: the image is too long and thin to be resized.
        """
        if self.method == "tf-squash":
            return tf_squash(np.asarray(image), self.size)
        # The last row and column of a reduced JPEG cover only a part of a pixel.
        full, box = full_size(image)
        new = (self.resize, self.resize) if self.method == "pil-squash" else self._resized(*full)
        if new != image.size or box:
            image = image.resize(new, INTERPOLATIONS[self.interpolation], box)
        left, top = (self._corner(n - self.size) for n in new)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def view(self, image: Image.Image, key: str, number: int) -> np.ndarray:
        """Return one of many views of an RGB image, uint8 [size, size, 3].

        View 0 is the result of `apply`. Others are random-resized crops (Inception's augmentation) of 35 to 100 % of
        the area, more than for classification, as captions describe whole images. Views are not mirrored, as captions
        say left and right and images contain text. A crop depends on the size of the image, `key` (that of the row)
        and `number` only.

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
        """Return plain values for provenance; the inverse of `from_dict`.

        They are part of a tower's identity: optional fields are absent where they have their defaults.
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
        """Build from `to_dict`'s result."""
        return cls(**(value | {"mean": tuple(value["mean"]), "std": tuple(value["std"])}))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height with `resize` as the short side; the long one is truncated, as in torchvision."""
        short, long = min(width, height), max(width, height)
        new_long = int(self.resize * long / short)
        if self.resize * new_long > _MAX_RESIZED_PIXELS:
            raise ImageError(f"{width} x {height} pixels are too long and thin to be resized")
        return (self.resize, new_long) if width <= height else (new_long, self.resize)

    def _corner(self, gap: int) -> int:
        """Return the first pixel of the crop; torchvision rounds half to even, as Python does."""
        return gap // 2 if self.method == "hf-crop" else round(gap / 2)


def _interpolation(method: str) -> str:
    return "bilinear" if method == "tf-squash" else "bicubic"


def random_crop(width: int, height: int, key: str, number: int) -> tuple[int, int, int, int]:
    """Draw the left, top, right and bottom of a crop from the hash of `key` and `number`.

    As torchvision's RandomResizedCrop: ten attempts, then the whole image cut to the allowed ratio. All arithmetic is
    exact under IEEE 754, so that every machine draws the same crop.
    """
    for attempt in range(10):
        text = f"{number} {attempt} {key}".encode("utf-8", "surrogatepass")
        words = np.frombuffer(blake2b(text, digest_size=32).digest(), "<u8")
        share, shape, x, y = (int(word >> np.uint64(11)) / 2**53 for word in words)
        area = width * height * (_VIEW_AREA + (1 - _VIEW_AREA) * share)
        # The fraction of 2 * shape is the distance from square, its whole part selects wide or high.
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
    """Resize uint8 [h, w, c] to [size, size, c] as `tf.image.resize(antialias=False)`, truncated to uint8.

    Bilinear with half-pixel centres, in float32, along x and then along y. An image of that size is returned
    unchanged.
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
    """Return the two source positions and the weight of the second, each [size], for one axis."""
    scale = np.float32(length) / np.float32(size)
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(position)
    low = np.maximum(floor, 0).astype(np.int64)
    high = np.minimum(np.ceil(position), length - 1).astype(np.int64)
    return low, high, position - floor
