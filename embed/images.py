"""Reads, decodes and preprocesses the images of a dataset: ahead of the device, in order.

Threads suffice, since PIL and numpy release the interpreter lock while they decode and resize.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lit_fast.dataset import BLOCK, Block, Dataset, decode_block
from lit_fast.errors import UserError
from lit_fast.preprocess import ImageError, Preprocess, decode

_OPEN_FILES = 256
_ROWS_PER_TASK = 8


@dataclass(frozen=True)
class Batch:
    """Consecutive rows, ready for the device."""

    first: int  # row of the dataset
    rows: int
    images: np.ndarray  # uint8 [batch size, size, size, 3]; zeros where a row is invalid or there is none
    invalid: dict[int, str]  # row -> why its image could not be decoded


class _Descriptor:
    """An open file that closes itself when the last thread that reads from it lets go."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone at exit
        if self.number >= 0:
            close(self.number)


class Images:
    """The image files of a dataset by row, from any thread."""

    def __init__(self, dataset: Dataset, preprocess: Preprocess, max_pixels: int) -> None:
        self._dataset, self._preprocess, self._max_pixels = dataset, preprocess, max_pixels
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        reader = dataset.index_reader()
        self._block = lru_cache(maxsize=8)(lambda number: decode_block(reader.read(number)))

    def place(self, row: int) -> tuple[Block, int]:
        """The index block of a row and the row's number in it."""
        return self._block(row // BLOCK), row % BLOCK

    def bytes(self, row: int) -> bytes:
        """The image file of a row.

        Raises:
          UserError: its source cannot be read or has become shorter.
        """
        block, i = self.place(row)
        source, offset, left = block.sources[i], block.offsets[i], block.sizes[i]
        path = self._dataset.sources[source]
        parts = []
        try:
            file = self._descriptor(source)
            while left > 0:
                part = os.pread(file.number, left, offset)
                if not part:
                    raise UserError(f"{path} has become shorter since it was indexed; restore it")
                parts.append(part)
                offset, left = offset + len(part), left - len(part)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}; restore it and run this again"
            ) from None
        return b"".join(parts)

    def fill(self, first: int, rows: int, out: np.ndarray) -> dict[int, str]:
        """Write the pixels of some rows into `out` `[rows, size, size, 3]`; row -> reason of the invalid."""
        invalid = {}
        for i in range(rows):
            try:
                image = decode(self.bytes(first + i), max_pixels=self._max_pixels)
                out[i] = self._preprocess.apply(image)
            except ImageError as error:
                invalid[first + i] = str(error)
        return invalid

    def _descriptor(self, source: int) -> _Descriptor:
        with self._lock:
            file = self._open.get(source)
            if file is None:
                file = self._open[source] = _Descriptor(self._dataset.sources[source])
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(source)
            return file


def read_ahead(
    images: Images, spans: Iterable[tuple[int, int]], batch_size: int, size: int, workers: int
) -> Generator[Batch, None, None]:
    """Batches for `spans` of (first row, rows <= batch_size), in that order.

    As many batches are under way as keep all workers busy while the device has two; memory is bounded by
    them.
    """
    ahead = 3 + -(-workers * _ROWS_PER_TASK // batch_size)
    waiting: deque[tuple[Batch, list[Future[dict[int, str]]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for first, rows in spans:
            # A fresh array each time: on a CPU device JAX may use this memory itself.
            pixels = np.zeros((batch_size, size, size, 3), np.uint8)
            tasks = [
                pool.submit(images.fill, first + lo, hi - lo, pixels[lo:hi])
                for lo in range(0, rows, _ROWS_PER_TASK)
                for hi in [min(lo + _ROWS_PER_TASK, rows)]
            ]
            waiting.append((Batch(first, rows, pixels, {}), tasks))
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
