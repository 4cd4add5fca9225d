"""Train a tiny tower in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lit_fast.runs.metrics import read_metrics
from lit_fast.storage.paths import join

# A test puts `steps` before it and may add keys of [checkpoint] after it.
TINY = """
[text]
variant = "mu"
dtype = "float32"
[stream]
global_batch = 16
[optimizer]
warmup_steps = 1
[checkpoint]
"""


def start(
    path: Path, workdir: str, *more: str, devices: int = 1, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `lit-fast train` in the directory `path`, with its config.toml and its dataset d."""
    command = [
        sys.executable,
        "-m",
        "lit_fast",
        "train",
        "config.toml",
        "--workdir",
        workdir,
        "--dataset",
        "d",
    ]
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*command, *more],
        cwd=path,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str], status: int = 0) -> list[str]:
    """Return the output of each process of a training; all must end with `status`."""
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [status] * len(processes), "\n".join(outputs)
    return outputs


def metrics(run: Path | str, name: str = "loss") -> dict[int, float]:
    """Return a logged metric by step."""
    return {line["step"]: line[name] for line in read_metrics(join(run, "metrics.jsonl")) if name in line}


def lines_without_times(run: Path | str) -> list[dict[str, object]]:
    """Return the lines of metrics without what depends on the machine."""
    times = {
        "pairs_per_second",
        "seconds_per_step",
        "data_wait_share",
        "elapsed_seconds",
        "chip_hours",
        "mfu",
    }
    lines = [
        {k: v for k, v in line.items() if k not in times} for line in read_metrics(join(run, "metrics.jsonl"))
    ]
    return [line for line in lines if len(line) > 1]  # not those of restarts
