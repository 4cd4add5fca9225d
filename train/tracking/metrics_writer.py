"""Write the metrics of a run to `metrics.jsonl` and its trackers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from lit_fast.config import Config
from lit_fast.runs.metrics import RunCost, is_number, read_metrics
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import open_append
from lit_fast.storage.paths import StrPath, join
from lit_fast.train.tracking.console import Console
from lit_fast.train.tracking.throughput import ThroughputMeter
from lit_fast.train.tracking.trackers import Trackers


class MetricsWriter:
    """Appends metrics to `metrics.jsonl`, a JSON object per line, and sends them to trackers.

    An earlier process may have continued after its last checkpoint. Those steps are repeated, so their lines are
    removed; the time they took is kept in a line of the restart.

    Args:
      start_step: the step from which the run starts or resumes.
      cost_before: time and chip-hours of the earlier parts of the run.
    """

    def __init__(self, workdir: StrPath, config: Config, start_step: int, cost_before: RunCost) -> None:
        workdir = os.fspath(workdir)
        path = join(workdir, "metrics.jsonl")
        lines = read_metrics(path)
        kept = [line for line in lines if line["step"] <= start_step]
        if cost_before.seconds:
            seconds, chip_hours = cost_before
            kept.append({"step": start_step, "elapsed_seconds": seconds, "chip_hours": chip_hours})
        write_atomic(path, b"".join(map(_json_line, kept)))
        self._file = open_append(path)
        self._trackers = Trackers(workdir, config, start_step, lines[-1]["step"] if lines else 0)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the metrics after `step` updates, by the names in `lit_fast.runs.metrics`."""
        self._file.write(_json_line({"step": step} | values))
        self._trackers.write(step, values)

    def close(self) -> None:
        """Close the file and all trackers."""
        self._file.close()
        self._trackers.close()


def _json_line(line: dict[str, Any]) -> bytes:
    """Return a line of JSON; numbers that are not finite become null."""
    clean = {k: v if is_number(v) or not isinstance(v, float) else None for k, v in line.items()}
    return (json.dumps(clean, allow_nan=False) + "\n").encode()


class TrainingLog:
    """Logs metrics to `metrics.jsonl`, trackers and terminal, in the first process only."""

    def __init__(
        self, workdir: str, config: Config, start_step: int, cost_before: RunCost, meter: ThroughputMeter
    ) -> None:
        self._meter = meter
        first = jax.process_index() == 0
        self._writer = MetricsWriter(workdir, config, start_step, cost_before) if first else None
        self._console = Console(config.steps, start_step) if first else None

    def log_step(self, step: int, metrics: Mapping[str, jax.Array]) -> bool:
        """Log the metrics of a step together with the throughput since the last call.

        Returns:
          Whether the loss is finite, in every process.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values |= self._meter.read(step)
        if self._writer and self._console:
            self._writer.write(step, values)
            self._console.log(step, values)
        return math.isfinite(values["loss"])

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation after `step`."""
        if self._writer:
            self._writer.write(step, metrics)

    def advance(self) -> None:
        """Count a step on the terminal."""
        if self._console:
            self._console.advance()

    def close(self) -> None:
        """Close the files, the trackers and the line on the terminal."""
        if self._writer and self._console:
            self._console.close()
            self._writer.close()
