"""Decodes and preprocesses the images of a dataset: ahead of the device, in order.

Threads suffice, since PIL and numpy release the interpreter lock while they decode and resize.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from embed.fetch import Fetcher
from lit_fast.dataset import Block, Dataset
from lit_fast.preprocess import ImageError, Preprocess, decode

_ROWS_PER_TASK = 8


@dataclass(frozen=True)
class Batch:
    """Consecutive rows, ready for the device."""

    first: int  # row of the dataset
    rows: int
    images: np.ndarray  # uint8 [rows * views, size, size, 3]; zeros where a row is invalid or there is none
    invalid: dict[int, str]  # row -> why its image could not be decoded


class Images:
    """The pixels of a dataset's images by row, from any thread."""

    def __init__(self, dataset: Dataset, preprocess: Preprocess, max_pixels: int, views: int = 1) -> None:
        self._fetcher = Fetcher(dataset, preprocess.resize)  # noise that no resizing blurs
        self._preprocess, self._max_pixels, self._views = preprocess, max_pixels, views

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one row: views, height, width, channels."""
        return self._views, self._preprocess.size, self._preprocess.size, 3

    def place(self, row: int) -> tuple[Block, int]:
        """The index block of a row and the row's number in it."""
        return self._fetcher.place(row)

    def fill(self, first: int, rows: int, out: np.ndarray) -> dict[int, str]:
        """Write the pixels of some rows into `out` `[rows, *shape]`; row -> reason of the invalid.

        Raises:
          UserError: a source cannot be read.
        """
        invalid = {}
        for i in range(rows):
            try:
                self._fill(first + i, out[i])
            except ImageError as error:
                invalid[first + i] = str(error)
                out[i] = 0
        return invalid

    def _fill(self, row: int, out: np.ndarray) -> None:
        data = self._fetcher.bytes(row)
        how = self._preprocess
        image = decode(data, max_pixels=self._max_pixels, at_least=how.at_least, alpha=how.alpha)
        if self._views == 1:
            out[0] = self._preprocess.apply(image)
            return
        block, i = self._fetcher.place(row)
        for number in range(self._views):
            out[number] = self._preprocess.view(image, block.keys[i], number)


def read_ahead(
    images: Images, spans: Iterable[tuple[int, int]], batch_rows: int, workers: int
) -> Generator[Batch, None, None]:
    """Batches for `spans` of (first row, rows <= batch_rows), in that order.

    As many batches are under way as keep all workers busy while the device has two; memory is bounded by
    them.
    """
    ahead = 3 + -(-workers * _ROWS_PER_TASK // batch_rows)
    waiting: deque[tuple[Batch, list[Future[dict[int, str]]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for first, rows in spans:
            # A fresh array each time: on a CPU device JAX may use this memory itself.
            pixels = np.zeros((batch_rows, *images.shape), np.uint8)
            tasks = [
                pool.submit(images.fill, first + lo, hi - lo, pixels[lo:hi])
                for lo in range(0, rows, _ROWS_PER_TASK)
                for hi in [min(lo + _ROWS_PER_TASK, rows)]
            ]
            waiting.append((Batch(first, rows, pixels.reshape(-1, *images.shape[1:]), {}), tasks))
            if len(waiting) >= ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(batch: Batch, tasks: list[Future[dict[int, str]]]) -> Batch:
    for task in tasks:
        batch.invalid.update(task.result())
    return batch
