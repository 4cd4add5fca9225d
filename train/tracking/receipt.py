"""The receipt of a run: what was done on what, what it took and what came out."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lit_fast.config import Config, flatten
from lit_fast.runs.metrics import Spent, best, evaluations, read_metrics, speed, spent
from lit_fast.storage.files import read_json, read_object, write_json
from lit_fast.train.cost.memory import MemoryFit
from lit_fast.version import __version__

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def write_receipt(
    run: Path, config: Config, memory: MemoryFit, done: int, taken: Spent, results: list[dict[str, Any]]
) -> None:
    """Write `receipt.json`, of a finished run or one that was stopped after `done` steps.

    Everything else is read from the directory, so the metrics must have been written before. Times are seconds
    of wall clock over all parts of the run, "chip_hours" the same times the devices; "pairs_per_second",
    "seconds_per_step", "mfu" and "data_wait_share" (both 0 to 1) are means over the steps without compilation,
    evaluation and saving.

    Args:
      memory: how this part of the run used it.
      results: of the last evaluation, with chance levels and intervals; none if there was none.
    """
    lines = read_metrics(run / "metrics.jsonl")
    tried = evaluations(lines)
    receipt = {
        "status": "finished" if done >= config.steps else "stopped",
        "steps_done": done,
        "steps": config.steps,
        "pairs_seen": done * config.stream.global_batch * config.stream.captions_per_image,
        "elapsed_seconds": taken.seconds,
        "chip_hours": taken.chip_hours,
        **speed(lines),
        "memory": memory.record,
        **_peak_memory(),
        "evaluation": {
            "final": tried[-1] if tried else None,
            "best": {name: found._asdict() for name, found in best(lines).items()},
            "results": results,
        },
        "hardware": {
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
            "host_cpu": _cpu(),
            "host_cores": os.cpu_count(),
        },
        "versions": {
            "lit_fast": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "digests": _digests(run),
        "config": flatten(config),
    }
    if (run / "text_init.json").is_file():
        receipt["text_init"] = read_json(run / "text_init.json")
    write_json(run / "receipt.json", receipt)


def spent_before(run: Path) -> Spent:
    """What the earlier parts of a run have taken, as far as its metrics and its receipt know.

    Of a part that was killed, what came after its last line is not known.
    """
    receipt = run / "receipt.json"
    known = [read_object(receipt, "elapsed_seconds", "chip_hours")] if receipt.is_file() else []
    return spent([*read_metrics(run / "metrics.jsonl"), *known])


def is_finished(run: Path) -> bool:
    """Whether there is the receipt of a finished run."""
    receipt = run / "receipt.json"
    return receipt.is_file() and read_object(receipt, "status")["status"] == "finished"


def _digests(run: Path) -> dict[str, str]:
    """What the run was trained on, each by the identity that decides whether it may go on."""
    stream = read_object(run / "stream.json", "identity", "dataset")
    return {
        "dataset": stream["dataset"],
        "stream": stream["identity"],
        "tower": read_object(run / "tower.json", "identity")["identity"],
        "tokens": read_object(run / "tokens.json", "identity")["identity"],
    }


def _peak_memory() -> dict[str, int]:
    """Of this part of the run: the fullest device of this process, or the process where devices do not tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return {"peak_device_memory_bytes": max(known)}
    # In kilobytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_process_memory_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _cpu() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
