"""Images of uniform random noise: the source `noise:1024` is 1024 of them, without a file."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from lit_fast.utils.permutation import random_words

DEFAULT_SIZE = 224  # pixels


def is_noise(path: str) -> bool:
    """Whether a source is noise; paths of files are absolute and URLs have slashes."""
    return re.fullmatch(r"noise:\d+", path, re.ASCII) is not None


def noise_image(number: int, size: int) -> bytes:
    """Return image `number` as a BMP file of `size` x `size` pixels, identical on every machine."""
    words = random_words(-(-size * size * 3 // 8), number).astype("<u8")
    pixels = words.view(np.uint8)[: size * size * 3].reshape(size, size, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()
