"""Images of uniform random noise, which need no file: `noise:1024` is 1024 of them."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from lit_fast.utils.permutation import random_words

SIDE = 224  # pixels, where no tower says how many it wants


def is_noise(path: str) -> bool:
    """Whether a source is noise; paths of files are absolute and URLs have slashes."""
    return re.fullmatch(r"noise:\d+", path, re.ASCII) is not None


def noise_image(number: int, side: int) -> bytes:
    """Picture `number` as a BMP of `side` x `side` pixels; equal on every machine."""
    words = random_words(-(-side * side * 3 // 8), number).astype("<u8")
    pixels = words.view(np.uint8)[: side * side * 3].reshape(side, side, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()
