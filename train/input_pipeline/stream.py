"""The stream of batches: every batch is a pure function of (seed, step).

One grain element is one whole batch, so that no Python code runs per row and the position is one integer. The shuffle
decides which rows a batch has: `exact_shuffle` for a dataset that fits in memory, `window_shuffle` for a larger one.
With `stream.neighbours` the former composes batches of groups of similar images, see `neighbour_order`.
The order depends neither on the number of devices nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.data.neighbours import Vectors, open_neighbours
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.storage.machine import available_memory
from lit_fast.train.input_pipeline.captions import read_captions
from lit_fast.train.input_pipeline.corruption import Corruption, open_corruption
from lit_fast.train.input_pipeline.exact_shuffle import ExactShuffle
from lit_fast.train.input_pipeline.neighbour_order import VERSION as GROUPS_VERSION
from lit_fast.train.input_pipeline.window_layout import plan_layout
from lit_fast.train.input_pipeline.window_shuffle import WindowShuffle

_LINKS = 32  # stored neighbours per row; more if the groups are large
_MEMORY_SHARE = 0.75  # of the memory that a process may use
ORDER_VERSION = "1"  # raise it when the order of the rows changes

Batch = dict[str, np.ndarray]
"""images bfloat16 [n, width], ids uint16 or uint32 [n * captions, length], rows int32 [n]."""


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

    def __len__(self) -> int:
        return 2**31  # grain needs a number; the stream has no end

    def __getitem__(self, step: int) -> Batch:
        corruption = self.corruption
        if corruption is None:
            return self.shuffle.read(step)
        batch = self.shuffle.read(step, corruption.text_positions(step))
        corruption.replace(step, self.first, batch["images"], batch["ids"])
        return batch


@dataclass(frozen=True)
class Stream:
    """An open stream of batches."""

    batches: Batches
    identity: str  # digest of everything that the batches depend on
    description: str  # for the user
    in_memory: bool  # held in memory and shuffled exactly

    def iterate(self, step: int, prepare: Callable[[Batch], Batch] = lambda batch: batch) -> Iterator[Batch]:
        """Yield the batches from `step` on; two threads read and prepare them ahead."""
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        iterator = iter(grain.MapDataset.source(self.batches).map(prepare).to_iter_dataset(options))
        iterator.set_state({"next_index": step})
        return iterator


class BatchBuffers:
    """A pool of reusable arrays for the images of batches.

    A buffer returns to the pool when its last view is garbage-collected, so that a batch can be kept, sliced and
    passed to JAX, which refers to aligned arrays without copying, like any other array. Without the pool the operating
    system clears the pages of every new batch, 15 to 30 % of the stream's processor time at 50 MB a batch.
    """

    KEEP = 8  # free buffers; no more batches than that are in flight

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._free: list[np.ndarray] = []

    def empty(self) -> np.ndarray:
        """Return an unused bfloat16 array with undefined content; from any thread."""
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(2 * self._shape[0] * self._shape[1], np.uint8)
        # Views of an array refer to the owner of the memory, but not beyond a memoryview: all views of this array
        # refer to it and keep it alive.
        array = np.frombuffer(block.data, BFLOAT16)
        weakref.finalize(array, self._return, block).atexit = False
        return array.reshape(self._shape)

    def _return(self, block: np.ndarray) -> None:
        if len(self._free) < self.KEEP:
            self._free.append(block)


def open_stream(
    features: Features,
    tokens: Tokens,
    config: StreamConfig,
    seed: int,
    part: tuple[int, int] = (0, 1),
    *,
    memory: int | None = None,
    in_memory: bool | None = None,
    center: bool = False,
) -> Stream:
    """Join features and tokens by position, after comparing their digests, and choose the shuffle.

    Args:
      features, tokens: of the same dataset.
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
    dataset, (process, processes) = features.dataset, part
    if dataset.rows >= 2**31:
        raise UserError(
            f"dataset {dataset.path} has {dataset.rows:,} rows; split it into datasets of at most 2^31 - 1"
        )
    invalid = features.invalid_rows()  # compares the digests
    if config.global_batch % processes:
        raise UserError(
            f"stream.global_batch {config.global_batch} is not divisible by {processes} processes; use a multiple"
        )
    captionless = np.empty(0, np.int64)
    if dataset.captionless:
        captionless = np.flatnonzero(np.concatenate([b.captions for b in dataset.iter_blocks()]) == 0)
    unusable = np.union1d(captionless, np.array(list(invalid), np.int64))
    usable_rows = dataset.rows - len(unusable)
    if not usable_rows:
        raise UserError(f"dataset {dataset.path} has no row with a valid image and a caption; use another")
    vectors = dataset.rows * features.views * features.width
    size = 2 * (vectors + dataset.captions * tokens.meta["max_length"])
    identity: list[Any] = [
        ORDER_VERSION, dataset.digest, features.identity, tokens.meta["identity"], seed, config.global_batch,
        config.captions_per_image, hashlib.blake2b(unusable.tobytes(), digest_size=16).hexdigest(),
    ]  # fmt: skip
    corruption = open_corruption(features, tokens, config, seed)
    local_batch = config.global_batch // processes
    buffers = BatchBuffers((local_batch, features.width))
    shuffle: Shuffle
    memory = available_memory() if memory is None else memory
    links = max(_LINKS, 2 * config.neighbours) if config.neighbours else 0
    fits = size + 4 * links * usable_rows <= _MEMORY_SHARE * memory
    if in_memory and not fits:
        raise UserError(
            f"dataset {dataset.path} was held in memory when this run started, {size / 2**30:.2f} GiB, and this "
            f"machine may use {memory / 2**30:.2f} GiB; resume it on a larger one, or choose another --workdir"
        )
    wanted = size <= config.memory_gib * 2**30
    in_memory = wanted and fits if in_memory is None else in_memory
    if links and not in_memory:
        reason = (
            f"this machine may use {memory / 2**30:.2f} GiB" if wanted else "that is above stream.memory_gib"
        )
        raise UserError(
            f"stream.neighbours needs the dataset in memory: {dataset.path} has {size / 2**30:.2f} GiB, and {reason}; "
            f"{'use a machine with more memory' if wanted else 'raise it'}, or set stream.neighbours = 0"
        )
    if in_memory:
        reader = tokens.reader()
        images = features.read_all(features.views).reshape(dataset.rows, features.views, features.width)
        usable = np.setdiff1d(np.arange(dataset.rows), unusable)
        neighbours = None
        how = "held in memory and shuffled exactly"
        if links:
            mean = features.mean(invalid) if center else np.zeros(features.width, np.float32)
            first_views = Vectors(images[:, 0], usable, mean)
            neighbours = open_neighbours(features, first_views, links, center=center)
            identity += [
                GROUPS_VERSION,
                config.neighbours,
                hashlib.blake2b(neighbours.data, digest_size=16).hexdigest(),
            ]
            how = f"held in memory, in groups of {config.neighbours} or more nearest images"
        shuffle = ExactShuffle(
            images,
            read_captions(tokens, (reader.read(b) for b in range(dataset.blocks))),
            usable,
            config,
            seed,
            np.arange(process * local_batch, (process + 1) * local_batch),
            buffers.empty,
            neighbours,
        )
    else:
        layout = plan_layout(dataset.rows, config)
        if layout.streams % processes:
            raise UserError(
                f"{layout.streams} streams cannot be divided among {processes} processes; make "
                "stream.shuffle_streams a multiple"
            )
        share = layout.streams // processes
        streams = range(process * share, (process + 1) * share)
        shuffle = WindowShuffle(features, tokens, unusable, layout, config, seed, streams, buffers.empty)
        identity += [config.shuffle_streams, config.shuffle_window_blocks]
        how = f"streamed, shuffled in windows of {shuffle.window_rows:,} rows"
        if wanted:
            how += f", as this machine may use only {memory / 2**30:.2f} GiB of memory"
    if corruption:
        identity += corruption.identity
        how += f"; corrupted: {corruption.description}"
    views = f", {features.views} views each" if features.views > 1 else ""
    skipped = f" ({len(unusable):,} without image or caption are skipped)" if len(unusable) else ""
    return Stream(
        in_memory=in_memory,
        batches=Batches(shuffle, corruption, process * local_batch),
        identity=hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest(),
        description=f"{usable_rows:,} rows{skipped}{views}, {size / 2**30:.2f} GiB, {how}",
    )
