"""Batches from a data set that is larger than the memory.

The blocks of an epoch are permuted and dealt to virtual streams. A stream shuffles the rows of a few
blocks, its window, and every batch takes the same number of rows from each stream. The first windows of
the streams have different lengths, so that within an epoch streams never all reload at once. Threads read
the blocks straight into a fixed pool of windows, and make their captions and order; batches are gathered
from there into arrays that JAX may keep without copying.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.batch_memory import BatchMemory
from lit_fast.train.input_pipeline.captions import choose_vectors, read_captions
from lit_fast.train.input_pipeline.corruption import Corruption
from lit_fast.utils.permutation import permutation

AHEAD = 4  # steps that the reading is ahead of the step
BEHIND = 1  # steps that two threads may ask out of turn
READERS = 8  # blocks read at once, which a disk needs


@dataclass(frozen=True)
class Geometry:
    """How an epoch of whole blocks is laid out over virtual streams; pure arithmetic.

    The last rows of the dataset (less than a block) are never used, and up to `streams * unit` blocks are
    left out of an epoch, other ones each time.
    """

    blocks: int  # whole blocks of the dataset
    streams: int
    rows: int  # rows that a batch takes from one stream
    unit: int  # blocks that windows are made of, so that a step never straddles two
    window: int  # blocks of a full window, a multiple of unit

    @property
    def length(self) -> int:
        """Blocks of one stream in one epoch."""
        return self.blocks // (self.streams * self.unit) * self.unit

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return self.length * BLOCK // self.rows

    def window_of(self, stream: int, step: int) -> tuple[tuple[int, int], int]:
        """First and last + 1 position in the stream's list of blocks, and the row to start from.

        `step` is counted in the epoch.
        """
        block = step * self.rows // BLOCK // self.unit * self.unit
        first = min((stream * self.unit) % self.window + self.unit, self.length)  # length of window 0
        if block < first:
            begin, end = 0, first
        else:
            begin = first + (block - first) // self.window * self.window
            end = min(begin + self.window, self.length)
        return (begin, end), step * self.rows - begin * BLOCK


def plan(rows: int, config: StreamConfig) -> Geometry:
    """The layout with the most streams that divides the batch evenly.

    Raises:
      UserError: there is none.
    """
    blocks, batch = rows // BLOCK, config.global_batch
    for streams in range(min(config.shuffle_streams, blocks, batch), 0, -1):
        share = batch // streams
        if batch % streams or (BLOCK % share and share % BLOCK):
            continue
        unit = max(1, share // BLOCK)
        if blocks >= streams * unit:
            window = -(-config.shuffle_window_blocks // unit) * unit
            return Geometry(blocks, streams, share, unit, window)
    raise UserError(
        f"a dataset of {rows:,} rows cannot be streamed in batches of {batch}: make stream.global_batch "
        f"a power of two of at most {blocks * BLOCK:,}, or raise stream.memory_gib to hold it in memory"
    )


@dataclass(frozen=True)
class _Table:
    """The rows of a window in the order in which its epoch takes them."""

    rows: np.ndarray  # int64 [rows], of the dataset
    vectors: np.ndarray  # int64 [rows], positions in the buffer as [rows * views, width]
    ids: np.ndarray  # integer [rows * captions per image, length]


@dataclass
class _Window:
    """The rows of a few blocks, in memory or on their way there; without a buffer only what they say."""

    buffer: np.ndarray | None
    last: int  # last step that uses it
    table: Future[_Table]
    reads: list[Future[None]]
    users: int = 0


class WindowSource:
    """Random access to batches; cheap when the steps come roughly in order."""

    def __init__(
        self,
        features: Features,
        tokens: Tokens,
        unusable: np.ndarray,
        config: StreamConfig,
        seed: int,
        part: tuple[int, int],
        corruption: Corruption | None,
    ) -> None:
        self.geometry = plan(features.dataset.rows, config)
        whole = unusable[unusable < self.geometry.blocks * BLOCK] // BLOCK
        empty = np.flatnonzero(np.bincount(whole, minlength=self.geometry.blocks) == BLOCK)
        if len(empty):
            first = empty[0] * BLOCK
            raise UserError(
                f"{features.path}: rows {first} to {first + BLOCK - 1} and {len(empty) - 1} other blocks hold no "
                "usable image; mend those and embed them anew, or raise stream.memory_gib"
            )
        process, processes = part
        if self.geometry.streams % processes:
            raise UserError(f"{self.geometry.streams} streams cannot be shared by {processes} processes")
        share = self.geometry.streams // processes
        self._mine = range(process * share, (process + 1) * share)
        # Where texts change places within the batch, every process holds the captions of all streams.
        self._told = range(self.geometry.streams) if config.corrupt_alignment else self._mine
        self._features, self._tokens, self._unusable = features, tokens, unusable
        self._config, self._seed, self._corruption = config, seed, corruption
        features.array()  # refuses an array of another shape or layout
        self._records = tokens.reader()
        self._block_reader = features.block_reader()
        self._readers = ThreadPoolExecutor(READERS, "stream")
        self._lock = threading.Lock()
        self._windows: dict[tuple[int, int, int], _Window] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._memory = BatchMemory((share * self.geometry.rows, features.width))
        # Two slots for each stream's window, because where an epoch begins all take a new one. One allocation:
        # bounded, reused, given back as a whole, and no memory until it is touched.
        self._free = list(np.empty((2 * share, *self._shape), BFLOAT16))

    @property
    def _shape(self) -> tuple[int, int]:
        """Of a window's buffer: rows, views * width."""
        return self.geometry.window * BLOCK, self._features.views * self._features.width

    @property
    def window_rows(self) -> int:
        """Rows that are shuffled together."""
        return self.geometry.streams * self.geometry.window * BLOCK

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        geometry = self.geometry
        with self._lock:
            self._retire(step)
            used = []
            for stream in self._told:
                window, start = self._window(stream, step, needed=True)
                assert window is not None
                window.users += 1
                used.append((window, start))
            for stream in self._told:
                self._window(stream, step + AHEAD, needed=False)
        images = self._memory.empty()
        k, texts, rows = self._config.captions_per_image, [], []
        for stream, (window, start) in zip(self._told, used, strict=True):
            table, stop = window.table.result(), start + geometry.rows
            texts.append(table.ids[start * k : stop * k])
            if window.buffer is None:
                continue
            rows.append(table.rows[start:stop])
            for read in window.reads:
                read.result()
            first = (stream - self._mine.start) * geometry.rows
            vectors, out = table.vectors[start:stop], images[first : first + geometry.rows]
            np.take(window.buffer.reshape(-1, images.shape[1]), vectors, axis=0, out=out, mode="clip")
        with self._lock:
            for window, _ in used:
                window.users -= 1
        ids = np.concatenate(texts)
        if self._corruption:
            first = self._mine.start * geometry.rows
            if self._config.corrupt_alignment:
                origins = self._corruption.origins(step)[first : first + len(images)]
                ids = ids.reshape(-1, k, ids.shape[1])[origins].reshape(-1, ids.shape[1])
            self._corruption.replace(step, first, images, ids)
        return {"images": images, "ids": ids, "rows": np.concatenate(rows).astype(np.int32)}

    def _retire(self, step: int, behind: int = BEHIND) -> None:
        """Give back the slots of windows that are behind or, after a jump, far ahead."""
        horizon = step + AHEAD + 2 * self.geometry.window * BLOCK // self.geometry.rows
        for key, window in list(self._windows.items()):
            if not window.users and not step - behind <= window.last <= horizon:
                for read in window.reads:
                    if not read.cancel():
                        read.exception()  # wait: a read in flight must not write into a reused slot
                del self._windows[key]
                if window.buffer is not None:
                    self._free.append(window.buffer)

    def _blocks(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
            self._orders[epoch] = permutation(self.geometry.blocks, self._seed, epoch)
        return self._orders[epoch]

    def _window(self, stream: int, step: int, *, needed: bool) -> tuple[_Window | None, int]:
        geometry = self.geometry
        epoch, inside = divmod(step, geometry.steps)
        (begin, end), start = geometry.window_of(stream, inside)
        key = (stream, epoch, begin)
        if key not in self._windows:
            if stream in self._mine and not self._free:
                if not needed:
                    return None, start  # no slot yet: read it later
                self._retire(step, behind=0)
            last = epoch * geometry.steps + end * BLOCK // geometry.rows - 1
            blocks = self._blocks(epoch)[stream :: geometry.streams][begin:end]
            self._windows[key] = self._load(blocks, last, key)
        return self._windows[key], start

    def _load(self, blocks: np.ndarray, last: int, key: tuple[int, int, int]) -> _Window:
        submit = self._readers.submit
        table = submit(self._table, blocks, key)
        if key[0] not in self._mine:
            return _Window(None, last, table, [])
        # Steps that come far out of turn may need a slot more.
        buffer = self._free.pop() if self._free else np.empty(self._shape, BFLOAT16)
        parts = buffer.reshape(-1, BLOCK, buffer.shape[1])[: len(blocks)]
        reads = [submit(self._block_reader.read, int(b), p) for b, p in zip(blocks, parts, strict=True)]
        return _Window(buffer, last, table, reads)

    def _table(self, blocks: np.ndarray, key: tuple[int, int, int]) -> _Table:
        rows = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        order = permutation(len(rows), self._seed, *key)
        if len(self._unusable):
            place = np.searchsorted(self._unusable, rows)
            bad = self._unusable[np.minimum(place, len(self._unusable) - 1)] == rows
            order = order[~bad[order]]
            if not len(order):
                raise UserError(f"blocks {blocks.tolist()} of {self._features.path} hold no usable row")
            # Other rows of the window stand in for those that cannot be used.
            order = np.resize(order, len(rows))
        rows, visit = rows[order], np.full(len(rows), key[1], np.int64)
        captions = read_captions(self._tokens, (self._records.read(int(b)) for b in blocks))
        return _Table(
            rows,
            choose_vectors(order, rows, visit, self._features.views, self._seed),
            captions.choose(order, rows, visit, self._config.captions_per_image, self._seed),
        )
