"""Memory for batches, taken again once nothing refers to the batch that was in it.

A freed batch of tens of megabytes goes back to the system, which clears every page before it gives it out
again.
"""

from __future__ import annotations

import weakref

import numpy as np

from lit_fast.data.features import BFLOAT16

KEEP = 8  # free blocks; more batches than that are not made ahead


class BatchMemory:
    """Gives out bfloat16 arrays of one shape, from any thread."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._free: list[np.ndarray] = []

    def empty(self) -> np.ndarray:
        """An array that nobody else has, with any content.

        It may be kept, sliced and handed to JAX, which refers to it while it uses it without copying: its
        memory is given out again when the last such reference is gone, as with any other array.
        """
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(2 * self._shape[0] * self._shape[1], np.uint8)
        # Views of an array refer to the array that owns the memory, but not past a memoryview: all views of
        # this one keep it alive.
        array = np.frombuffer(block.data, BFLOAT16)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array.reshape(self._shape)

    def _give_back(self, block: np.ndarray) -> None:
        if len(self._free) < KEEP:
            self._free.append(block)
