"""Pictures of uniform random noise, which need no file: `noise:1024` is 1024 of them."""

from __future__ import annotations

from collections.abc import Iterator

from lit_fast.embed.sources.items import Item, Layout, Names, Sample
from lit_fast.errors import UserError

_MOST = 1 << 20


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
