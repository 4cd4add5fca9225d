"""Metrics of a run: `metrics.jsonl`, TensorBoard events and, if wanted, Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from lit_fast.config import Config
from lit_fast.runs.metrics import RunCost, is_number, read_metrics
from lit_fast.storage.files import write_atomic
from lit_fast.train.tracking.wandb import WeightsAndBiases


class MetricsWriter:
    """Appends one JSON object per call; everything after `step` that an earlier process wrote is dropped.

    An earlier process may have got further than its last checkpoint; those steps will be done, and
    written, again. What they took is kept in the line of the restart.

    Args:
      step: the one that the run goes on after.
      before: what the earlier parts of the run have taken.
    """

    def __init__(self, run: Path, config: Config, step: int, before: RunCost) -> None:
        path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        if before.seconds:
            kept.append({"step": step, "elapsed_seconds": before.seconds, "chip_hours": before.chip_hours})
        write_atomic(path, "".join(map(_json_line, kept)).encode())
        self._file = open(path, "a")  # noqa: SIM115  (closed by close)
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, flush_secs=5)
        self._tracker = WeightsAndBiases(run, config) if config.log.wandb else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """`step` is the number of completed updates; the names are those in `lit_fast.runs.metrics`."""
        self._file.write(_json_line({"step": step} | values))
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._tracker:
            self._tracker.write(step, values)

    def close(self) -> None:
        """Bring everything to the disk."""
        self._file.close()
        self._events.close()
        if self._tracker:
            self._tracker.close()


def _json_line(line: dict[str, Any]) -> str:
    """JSON has neither NaN nor infinity."""
    clean = {k: v if is_number(v) or not isinstance(v, float) else None for k, v in line.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
