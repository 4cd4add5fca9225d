"""Keeps the devices of this process busy and measures what they wait for."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import jax
import numpy as np

from lit_fast.data.dataset import Block, Dataset
from lit_fast.data.images.decode import ImageError, decode
from lit_fast.data.images.reader import ImageReader
from lit_fast.errors import UserError
from lit_fast.towers.preprocess import Preprocess

# Decodes and preprocesses the images of a dataset: ahead of the device, in order.
#
# Threads suffice, since PIL and numpy release the interpreter lock while they decode and resize.


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
        self._reader = ImageReader(dataset, preprocess.resize)  # noise that no resizing blurs
        self._preprocess, self._max_pixels, self._views = preprocess, max_pixels, views

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one row: views, height, width, channels."""
        return self._views, self._preprocess.size, self._preprocess.size, 3

    def place(self, row: int) -> tuple[Block, int]:
        """The index block of a row and the row's number in it."""
        return self._reader.locate(row)

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
        data = self._reader.read(row)
        how = self._preprocess
        image = decode(data, max_pixels=self._max_pixels, at_least=how.at_least, alpha=how.alpha)
        if self._views == 1:
            out[0] = self._preprocess.apply(image)
            return
        block, i = self._reader.locate(row)
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


# Batches on the device or on their way: enough that it computes while the journal is brought to the disk.
_AHEAD = 4


def default_dtype() -> str:
    """The precision of the matrix products that the devices are made for."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


class Waiting:
    """Seconds that the main thread waited for decoded images and for the device's results."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was: compiling, and filling the pipeline."""
        self.images = self.device = 0.0
        self._began = time.monotonic()

    def note(self) -> str:
        """For the progress line."""
        total = time.monotonic() - self._began
        if not self.images + self.device:
            return ""
        if self.images > self.device:
            return f"waiting for images {self.images / total:.0%}"
        return f"waiting for the device {self.device / total:.0%}"

    def advice(self) -> str:
        """Which side is the bottleneck, and what to change; empty if too little was seen."""
        if not self.images + self.device:
            return ""
        if jax.default_backend() == "cpu":
            return f"{self.note()}: on a CPU decoding and the tower share the cores, more cores help both"
        if self.images > self.device:
            return f"{self.note()}: add cores or --workers, or --reduced-decode if the images are large"
        return f"{self.note()}: device-bound, nothing to gain on the host"


def results(
    batches: Iterator[Batch], run: Callable[[np.ndarray], jax.Array], waiting: Waiting
) -> Generator[tuple[Batch, np.ndarray], None, None]:
    """Every batch with its features, in order; several batches are on the device at any time.

    Raises:
      UserError: the device has too little memory.
    """
    flight: deque[tuple[Batch, jax.Array]] = deque()
    try:
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            waiting.images += time.monotonic() - began
            if batch is not None:
                result = run(batch.images)
                result.copy_to_host_async()
                flight.append((batch, result))
            if not flight:
                return
            if batch is None or len(flight) == _AHEAD:
                first, result = flight.popleft()
                began = time.monotonic()
                features = np.asarray(result)
                waiting.device += time.monotonic() - began
                yield first, features
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
            raise
        raise UserError(
            "the device is out of memory; lower --batch-size and run the same command again"
        ) from None
    finally:
        # Whatever ended the work: the interpreter must not end while the device still reads its arrays.
        for _, result in flight:
            with suppress(jax.errors.JaxRuntimeError):
                result.block_until_ready()
