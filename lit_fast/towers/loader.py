"""Decode and preprocess images in threads, ahead of the device and in order.

Threads suffice: PIL and numpy release the interpreter lock while they decode and resize.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lit_fast.data.dataset import Dataset
from lit_fast.data.images.decode import ImageError, decode
from lit_fast.data.images.reader import ImageReader
from lit_fast.towers.preprocess import Preprocess

_ROWS_PER_TASK = 8


@dataclass(frozen=True)
class Batch:
    """Consecutive rows, ready for the device."""

    first: int  # row of the dataset
    rows: int
    # uint8 [batch rows * views, size, size, 3]; zeros where a row is invalid or there is none
    images: np.ndarray
    invalid: dict[int, str]  # row of the dataset -> why its image could not be decoded


class ImageLoader:
    """Loads the pixels of a dataset's images by row; from any thread.

    Args:
      views: of each image, see `Preprocess.view`.
      cache: sizes of the caches of `ImageReader`, where rows are not loaded in order.
    """

    def __init__(
        self, dataset: Dataset, preprocess: Preprocess, max_pixels: int, views: int = 1, **cache: int
    ) -> None:
        self._reader = ImageReader(dataset, preprocess.resize, **cache)  # noise of a size that is not resized
        self._dataset = dataset
        self._preprocess, self._max_pixels, self._views = preprocess, max_pixels, views

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Views, height, width and channels of one row."""
        return self._views, self._preprocess.size, self._preprocess.size, 3

    def load(self, first: int, rows: int, out: np.ndarray) -> dict[int, str]:
        """Write the pixels of consecutive rows into `out`.

        Args:
          out: uint8 `[rows, *shape]`; invalid rows become zero.

        Returns:
          Invalid row of the dataset -> reason.

        Raises:
          UserError: a source cannot be read.
        """
        invalid = {}
        for i in range(rows):
            try:
                self._load_row(first + i, out[i])
            except ImageError as error:
                invalid[first + i] = str(error)
                out[i] = 0
        return invalid

    def open(self, row: int) -> Image.Image:
        """Decode the image of a row into RGB.

        Raises:
          UserError: the source cannot be read or has changed.
          ImageError: this image alone cannot be read or decoded.
        """
        return decode(
            self._reader.read(row),
            max_pixels=self._max_pixels,
            at_least=self._preprocess.at_least,
            alpha=self._preprocess.alpha,
        )

    def row_name(self, row: int) -> str:
        """Return the key of a row, with its source where the dataset has several."""
        return self._dataset.row_name(*self._reader.locate(row))

    def _load_row(self, row: int, out: np.ndarray) -> None:
        preprocess, image = self._preprocess, self.open(row)
        if self._views == 1:
            out[0] = preprocess.apply(image)
            return
        block, i = self._reader.locate(row)
        for number in range(self._views):
            out[number] = preprocess.view(image, block.keys[i], number)


def load_batches(
    loader: ImageLoader, spans: Iterable[tuple[int, int]], batch_rows: int, workers: int
) -> Generator[Batch, None, None]:
    """Yield a batch for each span (first row, rows <= batch_rows), in that order.

    Enough batches are loaded ahead to keep all workers busy while the device has two; they bound the memory.
    """
    ahead = 3 + -(-workers * _ROWS_PER_TASK // batch_rows)
    loading: deque[tuple[Batch, list[Future[dict[int, str]]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for first, rows in spans:
            # A new array for each batch: on a CPU device JAX may use this memory itself.
            pixels = np.zeros((batch_rows, *loader.shape), np.uint8)
            tasks = [
                pool.submit(loader.load, first + lo, hi - lo, pixels[lo:hi])
                for lo in range(0, rows, _ROWS_PER_TASK)
                for hi in [min(lo + _ROWS_PER_TASK, rows)]
            ]
            loading.append((Batch(first, rows, pixels.reshape(-1, *loader.shape[1:]), {}), tasks))
            if len(loading) >= ahead:
                yield _finished(*loading.popleft())
        while loading:
            yield _finished(*loading.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(batch: Batch, tasks: list[Future[dict[int, str]]]) -> Batch:
    for task in tasks:
        batch.invalid.update(task.result())
    return batch
