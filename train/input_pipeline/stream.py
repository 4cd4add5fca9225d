"""The stream of batches: every batch is a pure function of (seed, step).

One grain element is one whole batch, so that per-row Python never runs, and the position is one integer.
A data set that fits in memory is shuffled exactly; a larger one is read block by block through virtual
streams (`lit_fast.train.input_pipeline.windows`). The order does not depend on the number of devices or processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK, Dataset
from lit_fast.data.features import Features
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.batch_memory import BatchMemory
from lit_fast.train.input_pipeline.captions import Captions, choose_vectors, read_captions
from lit_fast.train.input_pipeline.corruption import Corruption, open_corruption
from lit_fast.train.input_pipeline.windows import WindowSource
from lit_fast.utils.permutation import permutation

Batch = dict[str, np.ndarray]
"""images bfloat16 [n, width], ids uint16 or uint32 [n * captions, length], rows int32 [n]."""


class Source(Protocol):
    """Random access to batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


class MemorySource:
    """Batches of an exact shuffle: epoch after epoch, every usable row once per epoch, none dropped.

    A batch may reach over the end of an epoch.
    """

    def __init__(
        self,
        features: np.ndarray,
        width: int,
        captions: Captions,
        usable: np.ndarray,
        config: StreamConfig,
        seed: int,
        part: tuple[int, int],
        corruption: Corruption | None,
    ) -> None:
        """`features` is bfloat16 [rows, views * width]."""
        self._views = features.shape[1] // width
        self._vectors = features.reshape(-1, width)
        self._captions, self._usable = captions, usable
        self._config, self._seed, self._corruption = config, seed, corruption
        process, processes = part
        share = config.global_batch // processes
        self._mine = np.arange(process * share, (process + 1) * share)
        self._memory = BatchMemory((share, width))
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return 2**31  # endless for practical purposes; grain wants a number

    def _order(self, epoch: int) -> np.ndarray:
        order = self._epochs.get(epoch)
        if order is None:
            order = self._usable[permutation(len(self._usable), self._seed, epoch)]
            # Two threads may both come here; they store the same thing.
            self._epochs = {e: o for e, o in self._epochs.items() if abs(e - epoch) <= 2} | {epoch: order}
        return order

    def _rows(self, step: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [n] at some places of the global batch, and the epoch of each."""
        epoch, offset = np.divmod(step * self._config.global_batch + places, len(self._usable))
        rows = np.empty(len(places), np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            rows[here] = self._order(e)[offset[here]]
        return rows, epoch

    def __getitem__(self, step: int) -> Batch:
        k, corruption = self._config.captions_per_image, self._corruption
        rows, epoch = self._rows(step, self._mine)
        vectors = choose_vectors(rows, rows, epoch, self._views, self._seed)
        images = np.take(self._vectors, vectors, axis=0, out=self._memory.empty(), mode="clip")
        told, visit = self._rows(step, corruption.origins(step)[self._mine]) if corruption else (rows, epoch)
        ids = self._captions.choose(told, told, visit, k, self._seed)
        if corruption:
            corruption.replace(step, int(self._mine[0]), images, ids)
        return {"images": images, "ids": ids, "rows": rows.astype(np.int32)}


@dataclass(frozen=True)
class Stream:
    """An opened stream: batches, their identity, and what a user wants to know of it."""

    source: Source
    identity: str  # of everything that decides the batches; the devices do not
    description: str

    def iterate(self, step: int, prepare: Callable[[Batch], Batch] = lambda batch: batch) -> Iterator[Batch]:
        """Batches from `step` on, produced and prepared ahead by two threads."""
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        iterator = iter(grain.MapDataset.source(self.source).map(prepare).to_iter_dataset(options))
        iterator.set_state({"next_index": step})
        return iterator


def open_stream(
    features: Features, tokens: Tokens, config: StreamConfig, seed: int, part: tuple[int, int] = (0, 1)
) -> Stream:
    """Join features and tokens by position, after comparing their digests, and choose how to read them.

    `part` is (process, processes): every process gets its slice of each global batch.

    Raises:
      UserError: something is missing or does not belong together, or no row can be trained on.
    """
    dataset = features.dataset
    if dataset.rows >= 2**31:
        raise UserError(f"dataset {dataset.path} has {dataset.rows:,} rows; at most 2^31 - 1 can be streamed")
    invalid = features.invalid_rows()  # compares the digests
    if config.global_batch % part[1]:
        raise UserError(f"stream.global_batch {config.global_batch} is not divisible by {part[1]} processes")
    unusable = np.array(sorted(_captionless(dataset) | set(invalid)), np.int64)
    usable_rows = dataset.rows - len(unusable)
    if not usable_rows:
        raise UserError(f"dataset {dataset.path} has no row with a valid image and a caption")
    size = (
        dataset.rows * features.views * features.width * 2 + dataset.captions * tokens.meta["max_length"] * 2
    )
    in_memory = size <= config.memory_gib * 2**30
    identity: list[Any] = [
        "1", dataset.digest, features.identity, tokens.meta["identity"], seed, config.global_batch,
        config.captions_per_image, hashlib.blake2b(unusable.tobytes(), digest_size=16).hexdigest(),
    ]  # fmt: skip
    corruption = open_corruption(features, tokens, config, seed)
    source: Source
    if in_memory:
        usable = np.setdiff1d(np.arange(dataset.rows), unusable)
        reader = tokens.reader()
        captions = read_captions(tokens, (reader.read(b) for b in range(dataset.blocks)))
        vectors = features.read_all(features.views)
        source = MemorySource(vectors, features.width, captions, usable, config, seed, part, corruption)
        how = "held in memory and shuffled exactly"
    else:
        source = WindowSource(features, tokens, unusable, config, seed, part, corruption)
        identity += [config.shuffle_streams, config.shuffle_window_blocks]
        how = f"streamed, shuffled in windows of {source.window_rows:,} rows"
    if corruption:
        identity += corruption.identity
        how += f"; corrupted: {corruption.description}"
    text = json.dumps(identity).encode()
    views = f", {features.views} views each" if features.views > 1 else ""
    skipped = f" ({len(unusable):,} without image or caption are skipped)" if len(unusable) else ""
    return Stream(
        source=source,
        identity=hashlib.blake2b(text, digest_size=16).hexdigest(),
        description=f"{usable_rows:,} rows{skipped}{views}, {size / 2**30:.2f} GiB, {how}",
    )


def _captionless(dataset: Dataset) -> set[int]:
    """Rows without a caption; most datasets have none, and then nothing is read."""
    if not dataset.captionless:
        return set()
    return {
        b * BLOCK + i
        for b, block in enumerate(dataset.iter_blocks())
        for i, count in enumerate(block.captions)
        if count == 0
    }
