"""Reusable memory for the arrays of batches."""

from __future__ import annotations

import math
import weakref

import numpy as np

from lit_fast.data.features import BFLOAT16


class BatchBuffers:
    """A pool of reusable arrays for the features or pixels of batches.

    A buffer returns to the pool when its last view is garbage-collected, so that a batch can be kept, sliced and
    passed to JAX, which refers to aligned arrays without copying, like any other array. Without the pool the operating
    system clears the pages of every new batch, 15 to 30 % of the stream's processor time at 50 MB a batch.
    """

    KEEP = 8  # free buffers; no more batches than that are in flight

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype = BFLOAT16) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: list[np.ndarray] = []

    def empty(self) -> np.ndarray:
        """Return an unused array with undefined content; from any thread."""
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(self._dtype.itemsize * math.prod(self._shape), np.uint8)
        # Views of an array refer to the owner of the memory, but not beyond a memoryview: all views of this array
        # refer to it and keep it alive.
        array = np.frombuffer(block.data, self._dtype)
        weakref.finalize(array, self._return, block).atexit = False
        return array.reshape(self._shape)

    def _return(self, block: np.ndarray) -> None:
        if len(self._free) < self.KEEP:
            self._free.append(block)
