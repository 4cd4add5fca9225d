"""Measure the throughput of a training, its wait for data, and its total cost."""

from __future__ import annotations

import time

import jax

from lit_fast.runs.metrics import RunCost
from lit_fast.train.cost.hardware import peak_flops
from lit_fast.train.input_pipeline.images import Pixels

_SLOW_DECODING = 0.05  # share of time without evaluation and checkpoints


class Stopwatch:
    """Sums the time spent in its `with` blocks, in seconds."""

    def __init__(self) -> None:
        self.total = 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.total += time.monotonic() - self._started


class ThroughputMeter:
    """Measures throughput between two readings, and the cost of the run.

    Time under `paused` (compilation, checkpoints, evaluation) is excluded from the throughput; time under `waiting`
    is waiting for data.

    Args:
      flops_per_step: model FLOPs of one step on all devices together.
      images_per_step: of all processes together.
      pixels: decodes the images; None: features are read.
      start_step: the step from which the run starts or resumes.
      cost_before: time and chip-hours of the earlier parts of the run.
      started: `time.monotonic()` at the start of this part of the run.
    """

    def __init__(
        self,
        pairs_per_step: int,
        flops_per_step: float,
        devices: int,
        *,
        start_step: int,
        cost_before: RunCost,
        started: float,
        images_per_step: int = 0,
        pixels: Pixels | None = None,
    ) -> None:
        self.waiting, self.paused = Stopwatch(), Stopwatch()
        self._pairs, self._images, self._devices = pairs_per_step, images_per_step, devices
        self._pixels = pixels
        peak = peak_flops(jax.devices()[0])
        self._mfu_per_rate = flops_per_step / (peak * devices) if peak else None
        self._cost_before, self._started = cost_before, started
        # Step, time, paused and waiting seconds at the last reading, and at the first.
        self._last = self._first = (start_step, time.monotonic(), 0.0, 0.0)

    def cost(self) -> RunCost:
        """Return the cost of this part of the run and those before it."""
        seconds = time.monotonic() - self._started
        before = self._cost_before
        return RunCost(before.seconds + seconds, before.chip_hours + seconds * self._devices / 3600)

    def read(self, step: int) -> dict[str, float]:
        """Return metrics since the last reading, by the names in `lit_fast.runs.metrics`."""
        now = (step, time.monotonic(), self.paused.total, self.waiting.total)
        steps, seconds, paused, waiting = (a - b for a, b in zip(now, self._last, strict=True))
        self._last = now
        seconds = max(seconds - paused, 1e-9)
        rate = steps / seconds
        values = {
            "pairs_per_second": rate * self._pairs,
            "seconds_per_step": 1 / rate,
            "data_wait_share": min(1.0, waiting / seconds),
        }
        if self._pixels:
            values["images_per_second"] = rate * self._images
            values["unreadable_images"] = len(self._pixels.unreadable)
        if self._mfu_per_rate is not None:
            values["mfu"] = self._mfu_per_rate * rate
        cost = self.cost()
        return values | {"elapsed_seconds": cost.seconds, "chip_hours": cost.chip_hours}

    def advice(self) -> str:
        """Return how to decode faster, where the devices waited for images for 5 % of the time or more; else ""."""
        _, started, _, _ = self._first
        share = self.waiting.total / max(time.monotonic() - started - self.paused.total, 1e-9)
        if not self._pixels or share < _SLOW_DECODING:
            return ""
        note = f"waiting for images {share:.0%}"
        if jax.default_backend() == "cpu":
            return f"{note}: on a CPU decoding and the towers share the cores; more cores help both"
        return (
            f"{note}: add cores or image.workers, or index smaller copies of the images if they are much larger than "
            "image.resolution"
        )
