"""The order of a dataset that is larger than memory: windows of blocks, shuffled in virtual streams.

Goals
  * Read whole blocks only (1024 consecutive rows, 1.5 MB): random rows would need a read each.
  * Every batch is a pure function of (seed, step), whatever was read before and by however many processes.
  * Memory does not grow with the dataset, and no step waits for a burst of reads.

Terms
  block    1024 rows of the dataset, the unit of reading
  stream   a list of blocks; each epoch permutes all blocks and divides them into `streams` lists
  window   some consecutive blocks of a stream that are in memory together; their rows are permuted
  slot     the memory of one window

Mechanism, for 3 streams, windows of 2 blocks and 512 rows per step and stream. A batch takes the next rows of the
current window of every stream, so that it mixes rows of `streams * window` blocks:

    step        0   1   2   3   4   5   6   7   8
    stream 0  | 7     | 2, 12         | 5, 10         | ...
    stream 1  | 0, 9          | 14, 3         | 13, 6 ...
    stream 2  | 4     | 11, 8         | 1, 15         | ...
                ^
                batch 0: 512 rows of block 7, 512 of blocks 0 and 9, 512 of block 4

  * The first windows of the streams have different lengths, 1 to `window` blocks, so that streams do not all change
    their window at the same step (`window_layout`).
  * `read(step)` starts the reads of the windows of `step` and of `step + PREFETCH_STEPS`. A pool of threads reads
    each block into the slot of its window and, in one more task, computes the order of the window's rows and chooses
    their captions.
  * A window's slot is free again when its last step is over. There are two slots per stream, because all streams
    change their window at the end of an epoch. If no slot is free, a later call prefetches.
  * A process reads the streams of its part of the batch only. It reads captions of all streams if texts are exchanged
    within the batch, which needs the captions of other processes' rows.
  * grain calls `read` from several threads, slightly out of order, hence the lock, the count of users of a window and
    LATE_STEPS. After a jump to another step the windows of the old position are discarded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.data.shards import read_threads
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.captions import choose_views, read_captions
from lit_fast.train.input_pipeline.window_layout import WindowLayout
from lit_fast.utils.permutation import permutation

PREFETCH_STEPS = 4
LATE_STEPS = 1  # steps that threads may request out of order


@dataclass(frozen=True)
class _Order:
    """The rows of a window in the order of its steps."""

    rows: np.ndarray  # int64 [n], rows of the dataset
    vectors: np.ndarray  # int64 [n], positions in the slot as [rows * views, width]
    ids: np.ndarray  # integer [n * captions per image, length]


@dataclass
class _Window:
    """A window that is in memory or being read."""

    slot: np.ndarray | None  # bfloat16 [rows, views * width]; None: captions only
    last_step: int
    order: Future[_Order]
    reads: list[Future[None]]  # of the blocks into the slot
    users: int = 0  # calls of `read` that use it now


class WindowShuffle:
    """Random access to batches; efficient if steps are requested roughly in order.

    Args:
      features, tokens: of the same dataset; without features, batches have rows and captions only.
      unusable: int64 [n], sorted rows without a valid image or a caption; other rows of their windows replace them.
      layout: streams and windows.
      config: configuration of the stream.
      seed: seed of the run.
      local_streams: the streams of this process.
      new_images: returns an unused bfloat16 array [len(local_streams) * layout.rows, width].

    Raises:
      UserError: a block has no usable row, or the feature array has another shape or type.
    """

    def __init__(
        self,
        features: Features | None,
        tokens: Tokens,
        unusable: np.ndarray,
        layout: WindowLayout,
        config: StreamConfig,
        seed: int,
        local_streams: range,
        new_images: Callable[[], np.ndarray] | None,
    ) -> None:
        if features:
            features.array()  # checks shape and type
        store = features.path if features else tokens.dataset.path
        _check_blocks(unusable, layout.blocks, store)
        self.layout = layout
        self._local_streams = local_streams
        self._feature_streams = local_streams if features else range(0)
        self._caption_streams = range(layout.streams) if config.corrupt_alignment else local_streams
        self._tokens, self._unusable = tokens, unusable
        self._views = features.views if features else 1
        self._captions_per_image, self._seed, self._new_images = config.captions_per_image, seed, new_images
        self._block_reader = features.block_reader() if features else None
        self._records = tokens.reader()
        self._threads = ThreadPoolExecutor(read_threads(store), "stream")
        self._lock = threading.Lock()  # of the three fields below
        self._windows: dict[tuple[int, int, int], _Window] = {}  # (stream, epoch, begin)
        self._block_orders: dict[int, np.ndarray] = {}  # epoch -> permutation of the blocks
        self._slot_shape = layout.window * BLOCK, features.views * features.width if features else 0
        # One allocation, which takes no memory until it is written.
        self._free_slots = list(np.empty((2 * len(self._feature_streams), *self._slot_shape), BFLOAT16))

    @property
    def window_rows(self) -> int:
        """Rows that are shuffled together."""
        return self.layout.streams * self.layout.window * BLOCK

    def read(self, step: int, text_positions: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return a batch, see `lit_fast.train.input_pipeline.stream.Shuffle`."""
        count, k = self.layout.rows, self._captions_per_image
        with self._lock:
            self._release(step)
            windows = [self._acquire(stream, step) for stream in self._caption_streams]
            for stream in self._caption_streams:
                self._prefetch(stream, step + PREFETCH_STEPS)
        images = self._new_images() if self._new_images else None
        ids, rows = [], []
        for stream, (window, start) in zip(self._caption_streams, windows, strict=True):
            order, stop = window.order.result(), start + count
            ids.append(order.ids[start * k : stop * k])
            if stream in self._local_streams:
                rows.append(order.rows[start:stop])
            if window.slot is None or images is None:
                continue
            for read in window.reads:
                read.result()
            first = (stream - self._local_streams.start) * count
            vectors, out = order.vectors[start:stop], images[first : first + count]
            np.take(window.slot.reshape(-1, images.shape[1]), vectors, axis=0, out=out, mode="clip")
        with self._lock:
            for window, _ in windows:
                window.users -= 1
        texts = np.concatenate(ids)
        if text_positions is not None:  # `texts` are those of the global batch
            local = text_positions[self._local_streams.start * count :][: len(self._local_streams) * count]
            texts = texts.reshape(-1, k, texts.shape[1])[local].reshape(-1, texts.shape[1])
        batch = {"ids": texts, "rows": np.concatenate(rows).astype(np.int32)}
        return batch if images is None else {"images": images} | batch

    # All methods below but `_order` hold the lock.

    def _acquire(self, stream: int, step: int) -> tuple[_Window, int]:
        """Return the window of a step, which is now in use, and the first row of the step in it."""
        key, start = self._locate(stream, step)
        if key not in self._windows:
            if stream in self._feature_streams and not self._free_slots:
                self._release(step, late_steps=0)
            self._load(key)
        window = self._windows[key]
        window.users += 1
        return window, start

    def _prefetch(self, stream: int, step: int) -> None:
        """Start to read the window of a later step, if there is a slot for it."""
        key, _ = self._locate(stream, step)
        if key not in self._windows and (self._free_slots or stream not in self._feature_streams):
            self._load(key)

    def _locate(self, stream: int, step: int) -> tuple[tuple[int, int, int], int]:
        """Return the key of a window and the first row of the step in it."""
        epoch, step_in_epoch = divmod(step, self.layout.steps)
        (begin, _), start = self.layout.window_of(stream, step_in_epoch)
        return (stream, epoch, begin), start

    def _load(self, key: tuple[int, int, int]) -> None:
        """Start to read a window."""
        stream, epoch, begin = key
        layout, submit = self.layout, self._threads.submit
        (_, end), _ = layout.window_of(stream, begin * BLOCK // layout.rows)
        blocks = self._block_order(epoch)[stream :: layout.streams][begin:end]
        last_step = epoch * layout.steps + end * BLOCK // layout.rows - 1
        order = submit(self._order, blocks, key)
        if self._block_reader is None or stream not in self._feature_streams:
            self._windows[key] = _Window(None, last_step, order, [])
            return
        # Steps far out of order may need one more slot.
        slot = self._free_slots.pop() if self._free_slots else np.empty(self._slot_shape, BFLOAT16)
        parts = slot.reshape(-1, BLOCK, slot.shape[1])[: len(blocks)]
        read = self._block_reader.read
        reads = [submit(read, int(b), part) for b, part in zip(blocks, parts, strict=True)]
        self._windows[key] = _Window(slot, last_step, order, reads)

    def _release(self, step: int, late_steps: int = LATE_STEPS) -> None:
        """Return the slots of unused windows whose steps are over or, after a jump, far ahead."""
        horizon = step + PREFETCH_STEPS + 2 * self.layout.window * BLOCK // self.layout.rows
        for key, window in list(self._windows.items()):
            if not window.users and not step - late_steps <= window.last_step <= horizon:
                for read in window.reads:
                    if not read.cancel():
                        read.exception()  # waits: a read in progress must not write into a reused slot
                del self._windows[key]
                if window.slot is not None:
                    self._free_slots.append(window.slot)

    def _block_order(self, epoch: int) -> np.ndarray:
        """Return the blocks in the order of an epoch; stream s has every `streams`-th of them from s on."""
        if epoch not in self._block_orders:
            self._block_orders = {e: o for e, o in self._block_orders.items() if abs(e - epoch) <= 1}
            self._block_orders[epoch] = permutation(self.layout.blocks, self._seed, epoch)
        return self._block_orders[epoch]

    def _order(self, blocks: np.ndarray, key: tuple[int, int, int]) -> _Order:
        """Permute the rows of a window and choose their captions and views."""
        rows = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        positions = usable_order(rows, self._unusable, (self._seed, *key))
        rows, epoch = rows[positions], np.full(len(rows), key[1], np.int64)
        captions = read_captions(self._tokens, (self._records.read(int(b)) for b in blocks))
        return _Order(
            rows,
            choose_views(positions, rows, epoch, self._views, self._seed),
            captions.choose(positions, rows, epoch, self._captions_per_image, self._seed),
        )


def usable_order(rows: np.ndarray, unusable: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Return a permutation int64 [n] of the positions of `rows` [n]; usable rows are repeated for unusable ones.

    Args:
      rows: int64 [n], at least one of them usable.
      unusable: int64 [m], sorted.
      key: seed of the permutation.
    """
    order = permutation(len(rows), *key)
    if len(unusable):
        nearest = unusable[np.minimum(np.searchsorted(unusable, rows), len(unusable) - 1)]
        order = order[(nearest != rows)[order]]
        order = np.resize(order, len(rows))
    return order


def _check_blocks(unusable: np.ndarray, blocks: int, store: str) -> None:
    """Raise UserError if a block has no usable row."""
    counts = np.bincount(unusable[unusable < blocks * BLOCK] // BLOCK, minlength=blocks)
    empty = np.flatnonzero(counts == BLOCK)
    if len(empty):
        first = empty[0] * BLOCK
        raise UserError(
            f"{store}: rows {first} to {first + BLOCK - 1} and {len(empty) - 1} other blocks have no usable image; "
            "restore those images and embed them again, or raise stream.memory_gib"
        )
