"""Metrics of a run: `metrics.jsonl`, TensorBoard events and a line on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from lit_fast.files import write_atomic
from lit_fast.metrics import read_metrics


class MetricsWriter:
    """Appends one JSON object per call; everything after `step` that an earlier process wrote is dropped.

    An earlier process may have got further than its last checkpoint; those steps will be done, and
    written, again.
    """

    def __init__(self, run: Path, step: int) -> None:
        path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "a")  # noqa: SIM115  (closed by close)
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1, flush_secs=5)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """`step` is the number of completed updates."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Bring everything to the disk."""
        self._file.close()
        self._events.close()
