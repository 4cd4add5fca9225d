"""Trainings of a tiny tower, as processes of their own, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lit_fast.runs.metrics import read_metrics

# The first keys of [checkpoint] may follow, and `steps` comes before.
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
    """`lit-fast train` in the directory `path`, on its config.toml and by default its dataset d."""
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
    """What each of the processes of one training said; they must end with `status`."""
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [status] * len(processes), "\n".join(outputs)
    return outputs


def metrics(run: Path, name: str = "loss") -> dict[int, float]:
    """One of the logged figures by step."""
    return {line["step"]: line[name] for line in read_metrics(run / "metrics.jsonl") if name in line}
