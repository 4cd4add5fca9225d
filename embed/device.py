"""Keeps the devices of this process busy and measures what they wait for."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress

import jax
import numpy as np

from embed.images import Batch
from lit_fast.errors import UserError

# Batches on the device or on their way: enough that it computes while the journal is brought to the disk.
_AHEAD = 4


def default_dtype() -> str:
    """The precision of the matrix products that the devices are made for."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


class Waiting:
    """Seconds that the main thread waited for decoded images and for the device's results."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was: compiling, and filling the pipeline."""
        self.images = self.device = 0.0
        self._began = time.monotonic()

    def note(self) -> str:
        """For the progress line."""
        total = time.monotonic() - self._began
        if not self.images + self.device:
            return ""
        if self.images > self.device:
            return f"waiting for images {self.images / total:.0%}"
        return f"waiting for the device {self.device / total:.0%}"

    def advice(self) -> str:
        """Which side is the bottleneck, and what to change; empty if too little was seen."""
        if not self.images + self.device:
            return ""
        if jax.default_backend() == "cpu":
            return f"{self.note()}: on a CPU decoding and the tower share the cores, more cores help both"
        if self.images > self.device:
            return f"{self.note()}: add cores or --workers, or --reduced-decode if the images are large"
        return f"{self.note()}: device-bound, nothing to gain on the host"


def results(
    batches: Iterator[Batch], run: Callable[[np.ndarray], jax.Array], waiting: Waiting
) -> Generator[tuple[Batch, np.ndarray], None, None]:
    """Every batch with its features, in order; several batches are on the device at any time.

    Raises:
      UserError: the device has too little memory.
    """
    flight: deque[tuple[Batch, jax.Array]] = deque()
    try:
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            waiting.images += time.monotonic() - began
            if batch is not None:
                result = run(batch.images)
                result.copy_to_host_async()
                flight.append((batch, result))
            if not flight:
                return
            if batch is None or len(flight) == _AHEAD:
                first, result = flight.popleft()
                began = time.monotonic()
                features = np.asarray(result)
                waiting.device += time.monotonic() - began
                yield first, features
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error)):
            raise
        raise UserError(
            "the device is out of memory; lower --batch-size and run the same command again"
        ) from None
    finally:
        # Whatever ended the work: the interpreter must not end while the device still reads its arrays.
        for _, result in flight:
            with suppress(jax.errors.JaxRuntimeError):
                result.block_until_ready()
