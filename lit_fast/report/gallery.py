"""Pictures on a page: small copies of image files, with a line of text below each."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lit_fast.data.images.decode import ImageError, decode

ReadImage = Callable[[int], bytes | None]
"""Returns the image file of a row; None where it cannot be read."""

SHOWN = 5  # images or captions per query
SIDE = 128  # pixels of a thumbnail's longer side; style.css sets the width of a figure accordingly
MAX_BYTES = 8192  # of a thumbnail's file; base64 adds a third
_QUALITIES = (80, 60, 40, 20, 5)


class Figure(NamedTuple):
    """A picture with its caption, for the macros `strip` and `cards`.

    Attributes:
      source: as returned by `thumbnail`; None shows a box in place of the picture.
      text: the caption.
      kind: "right" frames the picture in green, "wrong" in red, "" not at all.
      link: target of a link around the picture; "": no link.
    """

    source: str | None
    text: str = ""
    kind: str = ""
    link: str = ""


def thumbnail(data: bytes | None) -> str | None:
    """Return an image file as the `data:` URI of a small JPEG; None if it is absent or cannot be decoded.

    The file is decoded with the limits of `lit_fast.data.images.decode` and encoded again, so only its pixels
    reach the page. Transparent pixels become white.
    """
    if data is None:
        return None
    try:
        image = decode(data, at_least=2 * SIDE, alpha="white")
    except ImageError:
        return None
    image.info.clear()  # PIL would copy a comment
    image.thumbnail((SIDE, SIDE))
    for quality in _QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= MAX_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def nearest(scores: np.ndarray, relevant: np.ndarray) -> list[tuple[int, int]]:
    """Return (rank, index) of the `SHOWN` highest scores; if none is relevant, the first relevant one follows.

    Args:
      scores: float32 [n].
      relevant: bool [n], at least one of them true.
    """
    order = np.argsort(-scores, kind="stable")
    first = int(np.flatnonzero(relevant[order])[0])
    ranks = [*range(min(SHOWN, len(order))), *([first] if first >= SHOWN else [])]
    return [(rank, int(order[rank])) for rank in ranks]


def nearest_images(scores: np.ndarray, relevant: int, rows: np.ndarray, read: ReadImage) -> list[Figure]:
    """Return the images `nearest` to a query, with cosines; the relevant one is framed.

    Args:
      scores: float32 [n], cosines of images and query.
      relevant: index of the image that belongs to the query.
      rows: int64 [n], the rows of the images.
      read: returns the image file of a row.
    """
    figures = []
    for rank, i in nearest(scores, np.arange(len(scores)) == relevant):
        text = f"{scores[i]:.3f}" if rank < SHOWN else f"no. {rank + 1:,}, {scores[i]:.3f}"
        figures.append(Figure(thumbnail(read(int(rows[i]))), text, "right" if i == relevant else ""))
    return figures
