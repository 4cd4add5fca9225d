"""Pictures of uniform random noise, which need no file: `noise:1024` is 1024 of them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from embed.sources.items import Item, Layout, Names, Sample
from lit_fast.errors import UserError
from lit_fast.permutation import random_words

SIDE = 224  # pixels, where no tower says how many it wants

_MOST = 1 << 20


def is_noise(path: str) -> bool:
    """Whether a source is noise; paths of files are absolute and URLs have slashes."""
    return re.fullmatch(r"noise:\d+", path, re.ASCII) is not None


def read_noise(path: str, names: Names) -> Iterator[Item]:
    """One row per picture, without captions.

    Raises:
      UserError: too many or none are asked for, or `names` asks for columns.
    """
    if names != Names():
        raise UserError(f"{path} is made of noise: it has no columns that options could name")
    digits = path.partition(":")[2]
    count = int(digits) if len(digits) < 20 else _MOST + 1
    if not 0 < count <= _MOST:
        raise UserError(f"source {path}: give a number of pictures from 1 to {_MOST:,}")
    yield Layout("noise")
    for number in range(count):
        yield Sample(f"noise-{number}", number, 0, ())


def noise_image(number: int, side: int) -> bytes:
    """Picture `number` as a BMP of `side` x `side` pixels; equal on every machine."""
    words = random_words(-(-side * side * 3 // 8), number).astype("<u8")
    pixels = words.view(np.uint8)[: side * side * 3].reshape(side, side, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()
