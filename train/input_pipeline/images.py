"""The pixels of batches: images decoded and resized on the host, for a trained image tower.

A shuffle decides the rows and captions of a batch as for stored features. Threads then decode the images of its rows,
whatever kind of source they are in, and resize them as `lit-fast embed` does. Pixels stay uint8; the device normalizes
them. Crops and mirroring are functions of (seed, step, row), so that the position in the data is one integer.

Unreadable images. Nothing but decoding tells whether an image can be read. Rows that the features of the run's tower
know to be invalid are left out like rows without captions. Any other row whose image cannot be read is replaced in its
batch, image and captions, by a row of the same block that is drawn from (seed, step, row): the batch keeps its size and
does not depend on the number of processes. Such rows are counted by `Pixels.unreadable`, and the first is reported.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lit_fast.data.dataset import BLOCK, Dataset
from lit_fast.data.features import Features
from lit_fast.data.images.decode import MAX_PIXELS, ImageError
from lit_fast.data.images.parquet import CACHED_BYTES
from lit_fast.data.images.reader import check_images
from lit_fast.data.images.sources import check_sources
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.storage.machine import cpu_count
from lit_fast.towers.loader import ImageLoader
from lit_fast.towers.preprocess import Preprocess
from lit_fast.train.input_pipeline.buffers import BatchBuffers
from lit_fast.train.input_pipeline.captions import read_captions, row_hash
from lit_fast.utils.output import status

_FLIP_SEED = 0x666C697000  # makes mirroring independent of the choice of captions
_SUBSTITUTE_SEED = 0x7375627374
_SUBSTITUTES = 64  # rows that are tried for one whose image cannot be read
_ROWS_PER_TASK = 8
_MEMORY_SHARE = 0.5  # of the memory of this process, for the pixels of batches
_PARQUET_SHARE = 0.25


@dataclass(frozen=True)
class Images:
    """The images of a dataset and what is made of them; takes the place of `Features`.

    Attributes:
      dataset: the dataset.
      preprocess: that of the image tower.
      crop: take random-resized crops, see `Preprocess.view`.
      flip: mirror half of the images.
      features: a store of features that were made with the same preprocessing; its invalid rows are left out.
      workers: threads of this process; 0: one per core.
    """

    dataset: Dataset
    preprocess: Preprocess
    crop: bool = False
    flip: bool = False
    features: Features | None = None
    workers: int = 0

    row_bytes: ClassVar[int] = 64  # memory of a row of the index, which rows in random order need

    @property
    def threads(self) -> int:
        """Threads that decode."""
        return self.workers or cpu_count()

    @property
    def max_pixels(self) -> int:
        """Limit of the pixels of an image, that of the features."""
        options = self.features.provenance.get("options", {}) if self.features else {}
        return int(options.get("max_pixels", MAX_PIXELS))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.preprocess.size, self.preprocess.size, 3

    @property
    def identity(self) -> list[Any]:
        """Everything here that the batches depend on, besides the rows."""
        return ["images", self.preprocess.to_dict(), self.crop, self.flip, self.max_pixels]

    @property
    def description(self) -> str:
        """For the user."""
        p, size = self.preprocess, self.preprocess.size
        views = ", random crops" * self.crop + ", half of them mirrored" * self.flip
        return f"images decoded to {size} x {size} pixels ({p.method}{views}) by {self.threads} threads"

    def prefetch(self, batch: int, memory: int) -> int:
        """Return how many batches of pixels to decode ahead, at most 3.

        Args:
          batch: images of this process.
          memory: bytes that it may use. Beside those ahead, one batch is trained on and one passed to the devices.

        Raises:
          UserError: not even one fits.
        """
        size = batch * math.prod(self.shape)
        ahead = int(_MEMORY_SHARE * memory) // size - 2
        if ahead < 1:
            side = self.preprocess.size
            raise UserError(
                f"a batch of {batch:,} images of {side} x {side} pixels takes {size / 2**30:.2f} GiB, three of which "
                f"do not fit the {memory / 2**30:.2f} GiB of memory that this machine may use; divide it among more "
                "processes, or lower stream.global_batch"
            )
        return min(3, ahead)

    def invalid_rows(self) -> dict[int, str]:
        """Return the rows whose images are known to be unreadable, and the reasons."""
        return self.features.invalid_rows() if self.features else {}


def check_image_sources(dataset: Dataset) -> None:
    """Check that the images of a dataset are there, as they were indexed; reads a sample of the image files.

    Raises:
      UserError: the dataset has no images, a source is missing or has changed, or sampled images have.
    """
    if all(source.kind == "features" for source in dataset.sources):
        raise UserError(
            f"{dataset.path} was imported as features and has no images to train an image tower on; index the images "
            'as a dataset, or set image.train = "frozen"'
        )
    check_sources(dataset)
    check_images(dataset)


class Pixels:
    """Adds the pixels of their images to batches of rows; from any thread.

    Args:
      images: the images and what is made of them.
      tokens: of the same dataset, for the captions of rows that replace others.
      unusable: int64 [n], sorted rows that are left out.
      seed: seed of the run.
      captions_per_image: as in the batches.
      buffers: arrays uint8 [batch of this process, size, size, 3].
      cached_blocks: blocks whose rows are in use at the same time.
      memory: bytes that this process may use; a part of them is for row groups of parquet files.
    """

    def __init__(
        self,
        images: Images,
        tokens: Tokens,
        unusable: np.ndarray,
        seed: int,
        captions_per_image: int,
        buffers: BatchBuffers,
        cached_blocks: int,
        memory: int,
    ) -> None:
        self._images, self._tokens, self._seed, self._k = images, tokens, seed, captions_per_image
        self._unusable = frozenset(unusable.tolist())
        self._records = tokens.reader()
        self._buffers = buffers
        cached_bytes = max(CACHED_BYTES, int(_PARQUET_SHARE * memory))
        self._loader = ImageLoader(
            images.dataset,
            images.preprocess,
            images.max_pixels,
            cached_blocks=cached_blocks,
            cached_bytes=cached_bytes,
        )
        parquet = sum(source.bytes for source in images.dataset.sources if source.kind == "parquet")
        if parquet > cached_bytes:
            status(
                f"note: {parquet / 2**30:.1f} GiB of parquet files exceed the {cached_bytes / 2**30:.1f} GiB for their "
                "row groups, so that each of those is read many times in an epoch; tar files are faster"
            )
        self._pool = ThreadPoolExecutor(images.threads, "decode")
        self._lock = threading.Lock()
        self._is_closed = False
        self.unreadable: dict[int, str] = {}  # row -> reason, of the rows met so far

    def close(self) -> None:
        """Stop to decode; batches in progress fail."""
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def add(
        self, batch: dict[str, np.ndarray], step: int, own_texts: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Return a batch with "pixels" uint8 [n, size, size, 3] of its rows int32 [n].

        Rows whose images cannot be read are replaced.

        Args:
          batch: ids integer [n * captions, length] and rows int32 [n]; changed in place.
          own_texts: bool [n], whether the texts are those of the row; None: all are.

        Raises:
          UserError: a source cannot be read or has changed, or no row can replace an unreadable one.
        """
        rows, pixels = batch["rows"].astype(np.int64), self._buffers.empty()
        flips = self._flips(rows, step)
        tasks = [
            self._pool.submit(self._load_rows, rows[part], step, flips[part], pixels[part])
            for first in range(0, len(rows), _ROWS_PER_TASK)
            for part in [slice(first, first + _ROWS_PER_TASK)]
        ]
        for number, failed in enumerate(_results(tasks)):
            for i in failed:
                position = number * _ROWS_PER_TASK + i
                self._replace(batch, position, step, pixels, own_texts is None or own_texts[position])
        return {"pixels": pixels} | batch

    def _load_rows(self, rows: np.ndarray, step: int, flips: np.ndarray, out: np.ndarray) -> list[int]:
        """Write the pixels of rows int64 [n] into `out` uint8 [n, size, size, 3]; return unreadable positions."""
        failed = []
        for i, row in enumerate(rows.tolist()):
            if self._is_closed:
                raise RuntimeError("the stream of images is closed")
            if not self._load(row, step, bool(flips[i]), out[i]):
                failed.append(i)
        return failed

    def _load(self, row: int, step: int, flip: bool, out: np.ndarray) -> bool:
        """Write the pixels of a row into `out` uint8 [size, size, 3]; return whether its image can be read."""
        preprocess = self._images.preprocess
        try:
            image = self._loader.open(row)
            if self._images.crop:
                pixels = preprocess.view(image, f"{self._seed} {step} {row}", 1)
            else:
                pixels = preprocess.apply(image)
        except ImageError as error:
            self._note(row, str(error))
            return False
        out[:] = pixels[:, ::-1] if flip else pixels
        return True

    def _flips(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Return which of the rows int64 [n] are mirrored, bool [n]."""
        if not self._images.flip:
            return np.zeros(len(rows), bool)
        return row_hash(rows + (step << 31), self._seed + _FLIP_SEED) >= 1 << 31

    def _replace(
        self, batch: dict[str, np.ndarray], position: int, step: int, pixels: np.ndarray, own_text: bool
    ) -> None:
        """Put another row of the same block at a position of a batch, with its captions unless they are foreign."""
        row = int(batch["rows"][position])
        first = row // BLOCK * BLOCK
        count = min(BLOCK, self._images.dataset.rows - first)
        draws = row_hash(np.full(_SUBSTITUTES, row + (step << 31)), self._seed + _SUBSTITUTE_SEED)
        draws = row_hash(draws + (np.arange(_SUBSTITUTES) << 32), self._seed)
        for other in (first + (draws * count >> 32)).tolist():
            if other in self._unusable or other in self.unreadable:
                continue
            flip = bool(self._flips(np.array([other]), step)[0])
            if not self._load(other, step, flip, pixels[position]):
                continue
            batch["rows"][position] = other
            if own_text:
                captions = read_captions(self._tokens, [self._records.read(first // BLOCK)])
                rows, epoch = np.array([other]), np.array([step])
                ids = captions.choose(rows - first, rows, epoch, self._k, self._seed)
                batch["ids"][position * self._k : (position + 1) * self._k] = ids
            return
        raise UserError(
            f"the image of {self._loader.row_name(row)!a} in {self._images.dataset.path} cannot be read "
            f"({self.unreadable[row]}), nor can those of {_SUBSTITUTES} rows near it; restore the images, or index the "
            "readable ones as a new dataset"
        )

    def _note(self, row: int, reason: str) -> None:
        with self._lock:
            first = not self.unreadable
            self.unreadable[row] = reason
        if first:
            status(
                f"the image of {self._loader.row_name(row)!a} cannot be read ({reason}); rows with unreadable images "
                "are replaced by others of their block and counted"
            )


def _results(tasks: list[Future[list[int]]]) -> list[list[int]]:
    """Return the results of all tasks; after an error of one the others are cancelled."""
    try:
        return [task.result() for task in tasks]
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
