"""Run the tower on loaded batches, keep the devices busy, and measure stalls."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress

import jax
import numpy as np

from lit_fast.errors import UserError
from lit_fast.towers.loader import Batch

# Batches on the device: enough that it computes while the journal is flushed to the disk.
_IN_FLIGHT = 4


class StallTimer:
    """Seconds of waiting for decoded images and for results of the device."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Reset the counts, which so far are those of compiling and filling the pipeline."""
        self.images = self.device = 0.0
        self._start = time.monotonic()

    def note(self) -> str:
        """Return the larger stall for the progress line; "" if there was none."""
        stall, label = max((self.device, "the device"), (self.images, "images"))
        return f"waiting for {label} {stall / (time.monotonic() - self._start):.0%}" if stall else ""

    def advice(self) -> str:
        """Return the bottleneck and how to widen it; "" if there was no stall."""
        if not (note := self.note()):
            return ""
        if jax.default_backend() == "cpu":
            return f"{note}: on a CPU decoding and the tower share the cores; more cores help both"
        if self.images > self.device:
            return f"{note}: add cores or --workers, or --reduced-decode if the images are large"
        return f"{note}: device-bound, nothing to gain on the host"


def run_tower(
    batches: Iterator[Batch], run: Callable[[np.ndarray], jax.Array], stalls: StallTimer
) -> Generator[tuple[Batch, np.ndarray], None, None]:
    """Yield every batch with its features, in order, with several on the device.

    Args:
      run: the compiled tower, uint8 `[n, size, size, 3]` to float32 `[n, width]`.
      stalls: counts the seconds of waiting.

    Raises:
      UserError: the device has too little memory.
    """
    in_flight: deque[tuple[Batch, jax.Array]] = deque()
    try:
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            stalls.images += time.monotonic() - start
            if batch is not None:
                result = run(batch.images)
                result.copy_to_host_async()
                in_flight.append((batch, result))
            if not in_flight:
                return
            if batch is None or len(in_flight) == _IN_FLIGHT:
                first, result = in_flight.popleft()
                start = time.monotonic()
                features = np.asarray(result)
                stalls.device += time.monotonic() - start
                yield first, features
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
            raise
        raise UserError(
            "the device is out of memory; lower --batch-size, then rerun the same command"
        ) from None
    finally:
        # The interpreter must not end while the device still reads its arrays.
        for _, result in in_flight:
            with suppress(jax.errors.JaxRuntimeError):
                result.block_until_ready()
