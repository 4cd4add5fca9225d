"""How fast a run is, how much of it is waiting for data, and what it has taken in all."""

from __future__ import annotations

import time

import jax

from lit_fast.runs.metrics import RunCost
from lit_fast.train.cost.hardware import peak_flops


class Span:
    """Adds up stretches of time: `with span: ...`."""

    def __init__(self) -> None:
        self.total = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.total += time.monotonic() - self._began


class Meter:
    """Speed since the last reading, and what the run has taken.

    Time under `paused` (compilation, checkpoints, evaluation) does not count as speed; time under `waiting` is
    waiting for data.

    Args:
      flops_per_step: of the model, over all devices.
      start: the step that this part of the run goes on after.
      before: what the earlier parts have taken.
      began: `time.monotonic()` when this part began.
    """

    def __init__(
        self,
        pairs_per_step: int,
        flops_per_step: float,
        devices: int,
        *,
        start: int,
        before: RunCost,
        began: float,
    ) -> None:
        self.waiting, self.paused = Span(), Span()
        self._pairs, self._devices = pairs_per_step, devices
        peak = peak_flops(jax.devices()[0])
        self._mfu_per_rate = flops_per_step / (peak * devices) if peak else None
        self._before, self._began = before, began
        self._last = time.monotonic()
        self._seen = (0.0, 0.0)
        self._number = start

    def spent(self) -> RunCost:
        """By this part of the run and those before."""
        seconds = time.monotonic() - self._began
        return RunCost(
            self._before.seconds + seconds, self._before.chip_hours + seconds * self._devices / 3600
        )

    def read(self, number: int) -> dict[str, float]:
        """Figures over the steps since the last reading; their names and units are in `lit_fast.runs.metrics`."""
        now = time.monotonic()
        took = now - self._last - (self.paused.total - self._seen[0])
        waited = self.waiting.total - self._seen[1]
        rate = (number - self._number) / max(took, 1e-9)
        self._last, self._number = now, number
        self._seen = (self.paused.total, self.waiting.total)
        values = {
            "pairs_per_second": rate * self._pairs,
            "seconds_per_step": 1 / rate,
            "data_wait_share": min(1.0, waited / max(took, 1e-9)),
        }
        if self._mfu_per_rate is not None:
            values["mfu"] = self._mfu_per_rate * rate
        spent = self.spent()
        return values | {"elapsed_seconds": spent.seconds, "chip_hours": spent.chip_hours}
