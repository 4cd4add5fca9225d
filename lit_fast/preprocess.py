"""From the bytes of an image file to the uint8 pixels that a vision tower expects.

Two resizing conventions, because weights come with one: `pil-crop` is what timm does for the AugReg
weights, `tf-squash` is what big_vision does. Normalisation by mean and std happens on the device.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401  (registered before threads)

MAX_PIXELS = 64_000_000
METHODS = ("pil-crop", "tf-squash")

# `decode` has its own cap, checked before any pixel is decoded; PIL's would print warnings below its limit
# and forbid a higher one.
Image.MAX_IMAGE_PIXELS = None

# A 1 x 30 000 pixel image has few pixels, but resized to a short side of 248 it has 1.8 thousand million.
_MAX_RESIZED_PIXELS = 64_000_000


class ImageError(ValueError):
    """An image file that cannot be used; the message is a short reason without the file's name."""


@dataclass(frozen=True)
class Preprocess:
    """How images become a tower's input.

    Attributes:
      method: "pil-crop": short side to `resize` (bicubic, antialiased), then the centre `size` x `size`.
        "tf-squash": both sides to `size` (bilinear, not antialiased), the aspect ratio is lost.
      size: height and width of the result, pixels.
      resize: short side before the crop, pixels; `size` for tf-squash.
      mean: per channel, of pixels scaled to [0, 1]; subtracted on the device.
      std: per channel, divided by on the device.
    """

    method: str
    size: int
    resize: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"preprocess method {self.method!r}; there are {' and '.join(METHODS)}")
        if self.size < 1 or self.resize < self.size:
            raise ValueError(f"preprocess: resize {self.resize} is smaller than size {self.size}")
        if self.method == "tf-squash":  # there is no crop, and one meaning must have one spelling
            object.__setattr__(self, "resize", self.size)

    def apply(self, image: Image.Image) -> np.ndarray:
        """An RGB image as uint8 `[size, size, 3]`.

        Raises:
          ImageError: the image is too long and thin to be resized.
        """
        if self.method == "pil-crop":
            return _pil_crop(image, self)
        return tf_squash(np.asarray(image), self.size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for provenance; the inverse of `from_dict`."""
        return self.__dict__ | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Preprocess:
        """Build from `to_dict`'s result."""
        return cls(**(value | {"mean": tuple(value["mean"]), "std": tuple(value["std"])}))


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file into an RGB image.

    * The format is sniffed from the content: JPEG, PNG or WebP, nothing else, whatever the file's name.
    * The size in the header must be at most `max_pixels`; this is checked before anything is decoded.
    * Of an animation the first frame is taken. The EXIF rotation is ignored, as timm and torchvision do.
    * Grey, palette, CMYK and alpha become RGB by PIL's `convert("RGB")` (alpha is dropped, not blended).
    * 16-bit grey is scaled to 8 bits (value / 257, rounded), where PIL's conversion would clip.

    Raises:
      ImageError: the file is not such an image, is too large, truncated or damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels are more than the limit of {max_pixels}")
            image.load()
            if image.mode.startswith("I"):
                grey = np.asarray(image).astype(np.uint32).clip(0, 65_535)
                return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("not a JPEG, PNG or WebP image") from None
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, IndexError, ...
        # No address of an object may stay in the reason: it is stored, and must be the same each time.
        reason = re.sub(r"\s*<.*?>", "", " ".join(str(error).split()))[:100]
        raise ImageError(f"damaged image: {reason or type(error).__name__}") from None


def _pil_crop(image: Image.Image, how: Preprocess) -> np.ndarray:
    """timm's evaluation transform: torchvision's Resize (short side, bicubic) and CenterCrop."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(how.resize * long / short)  # torchvision truncates
    if how.resize * new_long > _MAX_RESIZED_PIXELS:
        raise ImageError(f"{width} x {height} pixels are too long and thin to be resized")
    new = (how.resize, new_long) if width <= height else (new_long, how.resize)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    width, height = image.size
    # torchvision rounds half to even here, as Python does.
    left, top = round((width - how.size) / 2), round((height - how.size) / 2)
    return np.asarray(image.crop((left, top, left + how.size, top + how.size)))


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
