"""The image files of a dataset for pages: shown where they can be had, never a reason to stop."""

from __future__ import annotations

from functools import cache

from embed.fetch import Fetcher, check_source
from lit_fast.dataset import Dataset
from lit_fast.errors import UserError
from lit_fast.pictures import ReadPicture
from lit_fast.preprocess import ImageError


def picture_reader(dataset: Dataset) -> ReadPicture:
    """A function of a row to its image file; None if its source is missing or another than was indexed."""
    fetcher = Fetcher(dataset)

    @cache  # of a source that does not answer, each picture would wait for it again
    def usable(source: int) -> bool:
        try:
            check_source(dataset.sources[source], dataset)
            return True
        except (UserError, IndexError):  # rows that were imported without images have no source
            return False

    def read(row: int) -> bytes | None:
        block, i = fetcher.place(row)
        if not usable(block.sources[i]):
            return None
        try:
            return fetcher.bytes(row)
        except (ImageError, UserError):
            return None

    return read
