"""Decode image files to RGB, within limits of size."""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np
from PIL import Image

MAX_IMAGE = 256 << 20  # bytes

MAX_PIXELS = 64_000_000

# Each scan of a progressive JPEG costs a pass over all pixels, whatever its size. Encoders write about ten scans.
_MAX_SCANS = 100
_MAX_SEGMENTS = 10_000  # of a JPEG that are looked at
_NEXT_SEGMENT = re.compile(
    rb"\xff+[\xc0-\xcf\xd8-\xef\xfe]"
)  # markers of which libjpeg reads the length, SOI, EOI
_SEGMENT = struct.Struct(">BBH").unpack_from
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_JPEG_METADATA = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))  # APP1 to APP13, APP15, COM
_JPEG_HEADER = _JPEG_METADATA | {
    *range(0xC0, 0xD0),
    *range(0xDB, 0xE1),
    0xEE,
}  # segments before the first scan
_PNG_METADATA = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"))
_DRAFT: Any = ("draft",)  # key in `Image.info`; no file can set it, since the keys of files are strings


class ImageError(ValueError):
    """An image file that cannot be decoded; the message is a short reason without the name of the file."""


class ChangedImageError(ImageError):
    """An image file that is not the one that was indexed."""


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None, alpha: str = "drop"
) -> Image.Image:
    """Decode an image file into an RGB image.

    * The format is recognized by the content: JPEG, PNG, WebP, GIF or BMP. The name of the file does not matter.
    * The size in the header must be at most `max_pixels`, which is checked before anything is decoded. JPEGs of more
      than 100 scans are refused.
    * Bytes that are not part of the picture are not read: EXIF, thumbnails, text, colour profiles, further images and
      whatever follows the end.
    * The first frame of an animation is decoded. The EXIF rotation is ignored, as in timm and torchvision;
      transformers' `load_image` applies it.
    * Other modes are converted by `rgb`. CMYK JPEGs are treated as inverted, as Adobe writes them; 16-bit colour is
      reduced to its high byte, as in PIL.
    * With `at_least` libjpeg decodes a JPEG at 1/2, 1/4 or 1/8 if its short side keeps that many pixels.

    Raises:
      ImageError: the file is not such an image, is too large, truncated or damaged.
    """
    if data[:2] == b"\xff\xd8":
        data = _without_jpeg_metadata(data)
        if _has_many_scans(data):
            raise ImageError(f"JPEG with more than {_MAX_SCANS} scans")
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        data = _without_png_metadata(data)
    if data[8:16] == b"WEBPVP8X":  # PIL allocates the canvas when it opens the file
        width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
        _check_pixels(width, height, max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as image:
            _check_pixels(*image.size, max_pixels)
            full = image.size
            draft = None if at_least is None else image.draft(None, (at_least, at_least))  # type: ignore[arg-type]
            image.load()
            result = rgb(image, alpha)
            if draft and result.size != full:
                result.info[_DRAFT] = full, draft[1]
            return result
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("not a JPEG, PNG, WebP, GIF or BMP image") from None
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, IndexError, ...
        # The reason is stored and must be reproducible: remove the addresses of objects.
        reason = re.sub(r"\s*<.*?>", "", " ".join(str(error).split()))[:100]
        raise ImageError(f"damaged image: {reason or type(error).__name__}") from None


def full_size(image: Image.Image) -> tuple[tuple[int, int], tuple[float, float, float, float] | None]:
    """Return the size in the file of an image from `decode`, and the part of the image that covers it.

    The part is None for the whole image. A reduced JPEG may have a last row and column that are partly outside.
    """
    return image.info.get(_DRAFT, (image.size, None))


def rgb(image: Image.Image, alpha: str = "drop") -> Image.Image:
    """Convert a PIL image of any mode to RGB.

    * Grey, palette and CMYK by PIL's `convert("RGB")`; colour profiles are ignored. For transparency see
      `Preprocess.alpha`.
    * 16-bit grey is scaled to 8 bits (value / 257, rounded); PIL's conversion would clip it.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32).clip(0, 65_535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if alpha == "white" and ("A" in image.getbands() or image.info.get("transparency") is not None):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    image.info.pop("transparency", None)  # would print a warning; the colours are the same
    return image.convert("RGB")


def _without_jpeg_metadata(data: bytes) -> bytes:
    """Remove the segments before the first scan that do not change the pixels; PIL refuses some damaged ones."""
    parts, kept, position = [], 0, 2
    while position + 4 <= len(data):
        start, marker, size = _SEGMENT(data, position)
        if start != 0xFF or marker not in _JPEG_HEADER:
            break
        end = position + 2 + max(2, size)
        if end > len(data):
            break
        if marker in _JPEG_METADATA:
            parts.append(data[kept:position])
            kept = end
        position = end
    return b"".join([*parts, data[kept:]]) if parts else data


def _has_many_scans(data: bytes) -> bool:
    """Whether the first image of a JPEG has more than `_MAX_SCANS` scans or `_MAX_SEGMENTS` segments.

    The segments are followed as libjpeg does: bytes in a segment and after the end of the image are no scans.
    """
    if data.count(b"\xff\xda") <= _MAX_SCANS:  # fast, and right for nearly all files
        return False
    scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        found = _NEXT_SEGMENT.search(data, position)
        if found is None or data[found.end() - 1] in (_SOI, _EOI):
            return False
        scans += data[found.end() - 1] == _SOS
        if scans > _MAX_SCANS:
            return True
        position = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    return True


def _without_png_metadata(data: bytes) -> bytes:
    """Remove the chunks of text and colour profile, which PIL would decompress; they do not change the pixels."""
    parts, kept, position = [], 0, 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind = data[position + 4 : position + 8]
        if end > len(data) or kind == b"IEND":
            break
        if kind in _PNG_METADATA:
            parts.append(data[kept:position])
            kept = end
        position = end
    return b"".join([*parts, data[kept:]]) if parts else data


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise ImageError(f"{width} x {height} pixels are more than the limit of {limit}")
