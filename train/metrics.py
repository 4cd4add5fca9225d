"""Metrics of a run: `metrics.jsonl`, TensorBoard events and a line on the terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends one JSON object per call; everything from `step` on that an earlier process wrote is dropped.

    An earlier process may have got further than its last checkpoint; those steps will be done, and
    written, again.
    """

    def __init__(self, run: Path, step: int) -> None:
        path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a torn last line is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
