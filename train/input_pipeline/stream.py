"""The stream of batches: every batch is a pure function of (seed, step).

One grain element is one whole batch, so that no Python code runs per row and the position is one integer. The shuffle
decides which rows a batch has: `exact_shuffle` for a dataset that fits in memory, `window_shuffle` for a larger one.
With `stream.neighbours` the former composes batches of groups of similar images, see `neighbour_order`.
The order depends neither on the number of devices nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import Dataset
from lit_fast.data.features import Features
from lit_fast.data.neighbours import Vectors, open_neighbours
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.storage.machine import available_memory
from lit_fast.train.input_pipeline.buffers import BatchBuffers
from lit_fast.train.input_pipeline.captions import read_captions
from lit_fast.train.input_pipeline.corruption import Corruption, open_corruption
from lit_fast.train.input_pipeline.exact_shuffle import ExactShuffle
from lit_fast.train.input_pipeline.images import Images, Pixels
from lit_fast.train.input_pipeline.neighbour_order import VERSION as GROUPS_VERSION
from lit_fast.train.input_pipeline.window_layout import plan_layout
from lit_fast.train.input_pipeline.window_shuffle import WindowShuffle

_LINKS = 32  # stored neighbours per row; more if the groups are large
_MEMORY_SHARE = 0.75  # of the memory that a process may use
ORDER_VERSION = "1"  # raise it when the order of the rows changes

Batch = dict[str, np.ndarray]
"""ids uint16 or uint32 [n * captions, length], rows int32 [n], and images bfloat16 [n, width] or, for a trained image
tower, pixels uint8 [n, size, size, 3]."""


class Shuffle(Protocol):
    """An order of rows, with random access."""

    def read(self, step: int, text_positions: np.ndarray | None = None) -> Batch:
        """Return the part of a global batch that belongs to this process.

        Args:
          step: number of the batch.
          text_positions: int64 [global batch], the position whose row gives the texts of each position; None: the
            position itself.
        """
        ...


@dataclass(frozen=True)
class Batches:
    """Random access to the batches of this process, as grain needs it."""

    shuffle: Shuffle
    corruption: Corruption | None
    first: int  # position in the global batch of this process's first image
    pixels: Pixels | None = None  # of the images, where they are no stored features

    def __len__(self) -> int:
        return 2**31  # grain needs a number; the stream has no end

    def __getitem__(self, step: int) -> Batch:
        corruption = self.corruption
        text_positions = corruption.text_positions(step) if corruption else None
        batch = self.shuffle.read(step, text_positions)
        if self.pixels:
            own_texts = None
            if text_positions is not None:
                positions = np.arange(self.first, self.first + len(batch["rows"]))
                own_texts = text_positions[positions] == positions
            batch = self.pixels.add(batch, step, own_texts)
        if corruption:
            corruption.replace(step, self.first, batch.get("images"), batch["ids"])
        return batch


@dataclass(frozen=True)
class Stream:
    """An open stream of batches."""

    batches: Batches
    identity: str  # digest of everything that the batches depend on
    description: str  # for the user
    in_memory: bool  # held in memory and shuffled exactly
    prefetch: int = 4  # batches that are read ahead

    def iterate(self, step: int, prepare: Callable[[Batch], Batch] = lambda batch: batch) -> Iterator[Batch]:
        """Yield the batches from `step` on; two threads read and prepare them ahead."""
        threads = min(2, self.prefetch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self.prefetch)
        iterator = iter(grain.MapDataset.source(self.batches).map(prepare).to_iter_dataset(options))
        iterator.set_state({"next_index": step})
        return iterator

    @property
    def unreadable(self) -> str:
        """The number of rows whose images could not be read so far, for the user; "" without any."""
        pixels = self.batches.pixels
        count = len(pixels.unreadable) if pixels else 0
        noun = "image was" if count == 1 else "images were"
        return f"{count:,} unreadable {noun} replaced by other rows of the same block" if count else ""

    def close(self) -> None:
        """Stop to decode images ahead."""
        if self.batches.pixels:
            self.batches.pixels.close()


def open_stream(
    images: Features | Images,
    tokens: Tokens,
    config: StreamConfig,
    seed: int,
    part: tuple[int, int] = (0, 1),
    *,
    memory: int | None = None,
    in_memory: bool | None = None,
    center: bool = False,
) -> Stream:
    """Join images and tokens by position, after comparing their digests, and choose the shuffle.

    Args:
      images: features, or images to decode.
      tokens: of the same dataset.
      config: configuration of the stream.
      seed: seed of the run.
      part: (process, processes); every process reads its part of each global batch.
      memory: bytes that a process may use; None: those of this machine or container. A dataset that needs more than
        three quarters of them is streamed, whatever `stream.memory_gib` says.
      in_memory: whether the dataset is held in memory, as in the run that is resumed; None: choose.
      center: whether the loss centers the features, which decides which of them are near each other.

    Raises:
      UserError: something is missing or does not belong together, or no row can be trained on.
    """
    dataset = images.dataset
    features = images if isinstance(images, Features) else None
    if dataset.rows >= 2**31:
        raise UserError(
            f"dataset {dataset.path} has {dataset.rows:,} rows; split it into datasets of at most 2^31 - 1"
        )
    invalid = images.invalid_rows()  # compares the digests
    if config.global_batch % part[1]:
        raise UserError(
            f"stream.global_batch {config.global_batch} is not divisible by {part[1]} processes; use a multiple"
        )
    rows = _Rows(features, tokens, _unusable_rows(dataset, invalid), config, seed, *part)
    if not rows.usable:
        raise UserError(f"dataset {dataset.path} has no row with a valid image and a caption; use another")
    corruption = open_corruption(features, tokens, config, seed)
    size = 2 * dataset.captions * tokens.meta["max_length"] + dataset.rows * images.row_bytes
    memory = available_memory() if memory is None else memory
    wanted = size <= config.memory_gib * 2**30
    in_memory = _is_in_memory(rows, size, memory, wanted, in_memory)
    if in_memory:
        order = _exact_order(rows, invalid, center)
    else:
        limit = f", as this machine may use only {memory / 2**30:.2f} GiB of memory" if wanted else ""
        order = _window_order(rows, limit)
    identity = [
        ORDER_VERSION, dataset.digest, images.identity, tokens.meta["identity"], seed, config.global_batch,
        config.captions_per_image, hashlib.blake2b(rows.unusable.tobytes(), digest_size=16).hexdigest(),
        *order.identity,
    ]  # fmt: skip
    how = order.description
    if corruption:
        identity += corruption.identity
        how += f"; corrupted: {corruption.description}"
    pixels, prefetch = None, 4
    if isinstance(images, Images):
        prefetch = images.prefetch(rows.local_batch, memory)
        buffers = BatchBuffers((rows.local_batch, *images.shape), np.dtype(np.uint8))
        pixels = Pixels(
            images, tokens, rows.unusable, seed, config.captions_per_image, buffers, order.blocks, memory
        )
        how += f"; {images.description}, up to {prefetch} batches ahead"
    views = f", {features.views} views each" if features and features.views > 1 else ""
    left_out = len(rows.unusable)
    skipped = f" ({left_out:,} without image or caption are skipped)" if left_out else ""
    return Stream(
        in_memory=in_memory,
        batches=Batches(order.shuffle, corruption, rows.process * rows.local_batch, pixels),
        identity=hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest(),
        description=f"{rows.usable:,} rows{skipped}{views}, {size / 2**30:.2f} GiB, {how}",
        prefetch=prefetch,
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a dataset and the part of each batch that this process reads."""

    features: Features | None
    tokens: Tokens
    unusable: np.ndarray  # int64 [k], increasing: rows without image or caption
    config: StreamConfig
    seed: int
    process: int
    processes: int

    @property
    def dataset(self) -> Dataset:
        return self.tokens.dataset

    @property
    def usable(self) -> int:
        return self.dataset.rows - len(self.unusable)

    @property
    def local_batch(self) -> int:
        return self.config.global_batch // self.processes

    @property
    def links(self) -> int:
        """Stored neighbours per row, 0 without `stream.neighbours`."""
        return max(_LINKS, 2 * self.config.neighbours) if self.config.neighbours else 0

    @property
    def new_images(self) -> Callable[[], np.ndarray] | None:
        """Return an array for the features of a batch; None without features."""
        return BatchBuffers((self.local_batch, self.features.width)).empty if self.features else None


class _Order(NamedTuple):
    """An order of rows, chosen and opened."""

    shuffle: Shuffle
    identity: list[Any]  # of the order, beside that of the rows
    description: str
    blocks: int  # blocks in use and read ahead at a time


def _unusable_rows(dataset: Dataset, invalid: Collection[int]) -> np.ndarray:
    captionless = np.empty(0, np.int64)
    if dataset.captionless:
        captionless = np.flatnonzero(np.concatenate([b.captions for b in dataset.iter_blocks()]) == 0)
    return np.union1d(captionless, np.array(list(invalid), np.int64))


def _is_in_memory(rows: _Rows, size: int, memory: int, wanted: bool, before: bool | None) -> bool:
    """Return whether to hold the dataset in memory.

    Args:
      rows: of the dataset.
      size: bytes of features and ids.
      memory: bytes that a process may use.
      wanted: whether `stream.memory_gib` allows it.
      before: as in the run that is resumed; None: a new run.

    Raises:
      UserError: the dataset has to be in memory and does not fit.
    """
    path = rows.dataset.path
    fits = size + 4 * rows.links * rows.usable <= _MEMORY_SHARE * memory
    if before and not fits:
        raise UserError(
            f"dataset {path} was held in memory when this run started, {size / 2**30:.2f} GiB, and this machine may "
            f"use {memory / 2**30:.2f} GiB; resume it on a larger one, or choose another --workdir"
        )
    chosen = wanted and fits if before is None else before
    if rows.links and not chosen:
        reason = (
            f"this machine may use {memory / 2**30:.2f} GiB" if wanted else "that is above stream.memory_gib"
        )
        raise UserError(
            f"stream.neighbours needs the dataset in memory: {path} has {size / 2**30:.2f} GiB, and {reason}; "
            f"{'use a machine with more memory' if wanted else 'raise it'}, or set stream.neighbours = 0"
        )
    return chosen


def _exact_order(rows: _Rows, invalid: Mapping[int, str], center: bool) -> _Order:
    features, config, dataset = rows.features, rows.config, rows.dataset
    vectors = (
        features.read_all(features.views).reshape(dataset.rows, features.views, -1) if features else None
    )
    usable = np.setdiff1d(np.arange(dataset.rows), rows.unusable)
    neighbours, identity = None, []
    how = "held in memory and shuffled exactly" if features else "shuffled exactly"
    if rows.links and features and vectors is not None:
        mean = features.mean(invalid) if center else np.zeros(features.width, np.float32)
        compared = Vectors(vectors[:, 0], usable, mean)
        neighbours = open_neighbours(features, compared, rows.links, center=center)
        digest = hashlib.blake2b(neighbours.data, digest_size=16).hexdigest()
        identity = ["neighbours", GROUPS_VERSION, config.neighbours, digest]
        how = f"held in memory, in groups of {config.neighbours} or more nearest images"
    reader = rows.tokens.reader()
    captions = read_captions(rows.tokens, (reader.read(b) for b in range(dataset.blocks)))
    positions = np.arange(rows.process * rows.local_batch, (rows.process + 1) * rows.local_batch)
    shuffle = ExactShuffle(
        vectors, captions, usable, config, rows.seed, positions, rows.new_images, neighbours
    )
    return _Order(shuffle, identity, how, dataset.blocks)


def _window_order(rows: _Rows, limit: str) -> _Order:
    config = rows.config
    layout = plan_layout(rows.dataset.rows, config)
    if layout.streams % rows.processes:
        raise UserError(
            f"{layout.streams} streams cannot be divided among {rows.processes} processes; make "
            "stream.shuffle_streams a multiple"
        )
    share = layout.streams // rows.processes
    streams = range(rows.process * share, (rows.process + 1) * share)
    shuffle = WindowShuffle(
        rows.features, rows.tokens, rows.unusable, layout, config, rows.seed, streams, rows.new_images
    )
    how = f"streamed, shuffled in windows of {shuffle.window_rows:,} rows{limit}"
    identity = [config.shuffle_streams, config.shuffle_window_blocks]
    return _Order(shuffle, identity, how, blocks=2 * share * layout.window)
