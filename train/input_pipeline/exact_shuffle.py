"""The order of a dataset that is held in memory: an exact shuffle of all usable rows in every epoch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.train.input_pipeline.captions import Captions, choose_views
from lit_fast.utils.permutation import permutation


class ExactShuffle:
    """Batches of consecutive epochs; each epoch is a permutation of the usable rows.

    Every usable row occurs once per epoch. A batch may extend over the end of an epoch.

    Args:
      features: bfloat16 [rows, views, width].
      captions: of all rows.
      usable: int64 [n], rows with a valid image and a caption.
      config: configuration of the stream.
      seed: seed of the run.
      local_positions: int64 [m], positions of this process in the global batch.
      new_images: returns an unused bfloat16 array [m, width].
    """

    def __init__(
        self,
        features: np.ndarray,
        captions: Captions,
        usable: np.ndarray,
        config: StreamConfig,
        seed: int,
        local_positions: np.ndarray,
        new_images: Callable[[], np.ndarray],
    ) -> None:
        self._views = features.shape[1]
        self._vectors = features.reshape(-1, features.shape[2])
        self._captions, self._usable = captions, usable
        self._config, self._seed = config, seed
        self._local_positions, self._new_images = local_positions, new_images
        self._epochs: dict[int, np.ndarray] = {}

    def read(self, step: int, text_positions: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return a batch, see `lit_fast.train.input_pipeline.stream.Shuffle`."""
        rows, epoch = self._rows(step, self._local_positions)
        vectors = choose_views(rows, rows, epoch, self._views, self._seed)
        images = np.take(self._vectors, vectors, axis=0, out=self._new_images(), mode="clip")
        text_rows, text_epoch = rows, epoch
        if text_positions is not None:
            text_rows, text_epoch = self._rows(step, text_positions[self._local_positions])
        k = self._config.captions_per_image
        ids = self._captions.choose(text_rows, text_rows, text_epoch, k, self._seed)
        return {"images": images, "ids": ids, "rows": rows.astype(np.int32)}

    def _rows(self, step: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows int64 [n] at positions of the global batch, and the epoch of each."""
        epoch, offset = np.divmod(step * self._config.global_batch + positions, len(self._usable))
        rows = np.empty(len(positions), np.int64)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            rows[here] = self._order(e)[offset[here]]
        return rows, epoch

    def _order(self, epoch: int) -> np.ndarray:
        """Return the usable rows in the order of an epoch."""
        order = self._epochs.get(epoch)
        if order is None:
            order = self._usable[permutation(len(self._usable), self._seed, epoch)]
            # Two threads may both compute an order; they store equal arrays.
            self._epochs = {e: o for e, o in self._epochs.items() if abs(e - epoch) <= 2} | {epoch: order}
        return order
