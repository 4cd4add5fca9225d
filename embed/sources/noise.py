"""Read `noise:N`: N images of uniform random noise, which need no file."""

from __future__ import annotations

from collections.abc import Iterator

from lit_fast.embed.sources.interface import ColumnOptions, Item, Layout, Sample
from lit_fast.errors import UserError

_MAX_IMAGES = 1 << 20


def read_noise(path: str, options: ColumnOptions) -> Iterator[Item]:
    """Yield one row per image, without captions.

    Raises:
      UserError: the number of images is 0 or too large, or `options` name columns.
    """
    if options != ColumnOptions():
        raise UserError(f"{path} is noise and has no columns that options could name; leave them out")
    digits = path.partition(":")[2]
    count = int(digits) if len(digits) < 20 else _MAX_IMAGES + 1
    if not 0 < count <= _MAX_IMAGES:
        raise UserError(f"source {path}: give a number of images from 1 to {_MAX_IMAGES:,}")
    yield Layout("noise")
    for number in range(count):
        yield Sample(f"noise-{number}", number, 0, ())
