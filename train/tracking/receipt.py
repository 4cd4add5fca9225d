"""Write the receipt of a run: its inputs, versions, hardware, cost and results."""

from __future__ import annotations

import importlib.resources
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import jax

from lit_fast.config import Config, flatten
from lit_fast.runs.metrics import RunCost, best, evaluations, mean_speed, read_metrics, run_cost
from lit_fast.storage.files import is_file, read_bytes
from lit_fast.storage.paths import StrPath, absolute, join
from lit_fast.storage.text_files import read_json, read_object, write_json
from lit_fast.train.cost.memory import MemoryFit
from lit_fast.version import __version__

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")


def write_receipt(
    workdir: StrPath,
    config: Config,
    memory: MemoryFit,
    attention: dict[str, Any],
    step: int,
    cost: RunCost,
    results: list[dict[str, Any]],
) -> None:
    """Write `receipt.json` of a run that is finished, or stopped after `step` steps.

    Times are seconds of wall clock over all parts of the run, "chip_hours" the same times the number of devices;
    "pairs_per_second", "images_per_second" with a trained image tower, "seconds_per_step", "mfu" and "data_wait_share"
    (both 0 to 1) are means over the steps without compilation, evaluation and saving. The metrics are read from the
    directory and must have been written before.

    Args:
      memory: how this part of the run uses device memory.
      attention: `AttentionChoice.record` of this part of the run.
      results: of the last evaluation, with chance levels and intervals; empty: there was none.

    A run that trains its image tower has "image_tower": how, and the tower that it started from.
    """
    lines = read_metrics(join(workdir, "metrics.jsonl"))
    evaluated = evaluations(lines)
    receipt = {
        "status": "finished" if step >= config.steps else "stopped",
        "steps_done": step,
        "steps": config.steps,
        "pairs_seen": step * config.stream.global_batch * config.stream.captions_per_image,
        "elapsed_seconds": cost.seconds,
        "chip_hours": cost.chip_hours,
        **mean_speed(lines),
        "memory": memory.record,
        "attention": attention,
        **_peak_memory(),
        "evaluation": {
            "final": evaluated[-1] if evaluated else None,
            "best": {name: found._asdict() for name, found in best(lines).items()},
            "results": results,
        },
        "hardware": {
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
            "host_cpu": _cpu_name(),
            "host_cores": os.cpu_count(),
        },
        "versions": {
            "lit_fast": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "git": git_revision(),
        "digests": _digests(workdir),
        "config": flatten(config),
    }
    if is_file(join(workdir, "text_init.json")):
        receipt["text_init"] = read_json(join(workdir, "text_init.json"))
    if config.image.trained:
        start = read_object(join(workdir, "tower.json"), "name", "source", "identity")
        keys = ("name", "source", "sha256", "identity", "width", "pool", "patch", "preprocess")
        receipt["image_tower"] = {"train": config.image.train} | {k: start[k] for k in keys if k in start}
    write_json(join(workdir, "receipt.json"), receipt)


def read_cost(workdir: StrPath) -> RunCost:
    """Return the cost of the earlier parts of a run, from its metrics and its receipt.

    The time of a killed part after its last line of metrics is not known.
    """
    receipt = join(workdir, "receipt.json")
    known = [read_object(receipt, "elapsed_seconds", "chip_hours")] if is_file(receipt) else []
    return run_cost([*read_metrics(join(workdir, "metrics.jsonl")), *known])


def is_finished(workdir: StrPath) -> bool:
    """Return whether there is a receipt of a finished run."""
    receipt = join(workdir, "receipt.json")
    return is_file(receipt) and read_object(receipt, "status")["status"] == "finished"


def _digests(workdir: StrPath) -> dict[str, str]:
    """Return the identities of the inputs; a run resumes only with the same ones."""
    stream = read_object(join(workdir, "stream.json"), "identity", "dataset")
    return {
        "dataset": stream["dataset"],
        "stream": stream["identity"],
        "tower": read_object(join(workdir, "tower.json"), "identity")["identity"],
        "tokens": read_object(join(workdir, "tokens.json"), "identity")["identity"],
    }


def git_revision() -> dict[str, Any] | None:
    """Return commit and "dirty" of the git checkout of the code; None outside a checkout."""
    directory = absolute(os.fspath(importlib.resources.files("lit_fast")))  # type: ignore[call-overload]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", directory, *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # The code may also be installed below a repository that does not contain it, such as a .venv.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _peak_memory() -> dict[str, int]:
    """Return the peak of the fullest local device, or of the process if devices report none."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return {"peak_device_memory_bytes": max(known)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_process_memory_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in read_bytes("/proc/cpuinfo").decode(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
