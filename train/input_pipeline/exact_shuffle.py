"""The order of a dataset that is held in memory: an exact shuffle of all usable rows in every epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.train.input_pipeline.captions import Captions, choose_views
from lit_fast.train.input_pipeline.neighbour_order import neighbour_order
from lit_fast.utils.permutation import permutation


@dataclass(frozen=True)
class ExactShuffle:
    """Batches of consecutive epochs; each epoch is a permutation of the usable rows.

    Every usable row occurs once per epoch. A batch may extend over the end of an epoch. With `neighbours` the
    permutation is that of `lit_fast.train.input_pipeline.neighbour_order`.
    """

    features: np.ndarray | None  # bfloat16 [rows, views, width]; None: batches have rows and captions only
    captions: Captions  # of all rows
    usable: np.ndarray  # int64 [n], rows with a valid image and a caption
    config: StreamConfig
    seed: int  # of the run
    local_positions: np.ndarray  # int64 [m], positions of this process in the global batch
    new_images: Callable[[], np.ndarray] | None  # returns an unused bfloat16 array [m, width]
    neighbours: np.ndarray | None = None  # int32 [n, links], of the usable rows, as positions in `usable`
    _orders: dict[int, np.ndarray] = field(default_factory=dict)  # epoch -> rows

    def read(self, step: int, text_positions: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return a batch, see `lit_fast.train.input_pipeline.stream.Shuffle`."""
        rows, epoch = self._rows(step, self.local_positions)
        text_rows, text_epoch = rows, epoch
        if text_positions is not None:
            text_rows, text_epoch = self._rows(step, text_positions[self.local_positions])
        k = self.config.captions_per_image
        ids = self.captions.choose(text_rows, text_rows, text_epoch, k, self.seed)
        batch = {"ids": ids, "rows": rows.astype(np.int32)}
        if self.features is None or self.new_images is None:
            return batch
        _, views, width = self.features.shape
        chosen = choose_views(rows, rows, epoch, views, self.seed)
        images = np.take(self.features.reshape(-1, width), chosen, 0, self.new_images(), mode="clip")
        return {"images": images} | batch

    def _rows(self, step: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows int64 [n] at positions of the global batch, and the epoch of each."""
        epoch, offset = np.divmod(step * self.config.global_batch + positions, len(self.usable))
        rows = np.empty(len(positions), np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            rows[here] = self._order(e)[offset[here]]
        return rows, epoch

    def _order(self, epoch: int) -> np.ndarray:
        """Return the usable rows in the order of an epoch."""
        order = self._orders.get(epoch)
        if order is None:
            order = self.usable[self._permutation(epoch)]
            # Two threads may both compute an order; they store equal arrays.
            for old in [e for e in self._orders.copy() if abs(e - epoch) > 2]:
                self._orders.pop(old, None)
            self._orders[epoch] = order
        return order

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return a permutation of the positions in `usable`, int64 [n]."""
        if self.neighbours is None:
            return permutation(len(self.usable), self.seed, epoch)
        return neighbour_order(self.neighbours, self.config.neighbours, self.seed, epoch)
