"""How fast a run is and how much of it is waiting for data."""

from __future__ import annotations

import time

import jax

from train.flops import peak_flops


class Span:
    """Adds up stretches of time: `with span: ...`."""

    def __init__(self) -> None:
        self.total = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.total += time.monotonic() - self._began


class Meter:
    """Speed since the last reading.

    Time under `paused` (checkpoints, evaluation) does not count; time under `waiting` is waiting for data.
    """

    def __init__(self, pairs_per_step: int, flops_per_step: float, devices: int, start: int = 0) -> None:
        self.waiting, self.paused = Span(), Span()
        self._pairs = pairs_per_step
        peak = peak_flops(jax.devices()[0])
        self._mfu_per_rate = flops_per_step / (peak * devices) if peak else None
        self._began = self._last = time.monotonic()
        self._seen = (0.0, 0.0)
        self._number = start

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return time.monotonic() - self._began

    def read(self, number: int) -> dict[str, float]:
        """Figures over the steps since the last reading; the first one has the compilation in it."""
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
        return values
