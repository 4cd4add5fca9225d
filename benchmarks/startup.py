"""Seconds from a command to its first result: help, the first step of a training, a dataset of 100 million rows.

    python -m benchmarks.startup [--dataset D] [--rows 100000000] [--repeats 5]

The training is the CPU recipe's, on D or on 6000 rows made of numbers, compiled before; its time ends when the
metrics of step 1 are in its file. PyTorch, which is no dependency but which tensorboardX imports where it is
installed, is kept out of it. The large dataset has 64-wide features, and its shards are hard links to one file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.machine import describe, run_alone
from benchmarks.stream_store import make_linked_store

CONFIG = Path(__file__).parents[1] / "configs" / "flickr8k_cpu.toml"
COMMAND = [
    sys.executable, "-c",
    "import sys; sys.modules['torch'] = None; from lit_fast.cli.main import main; sys.exit(main())",
]  # fmt: skip


def show_help() -> float:
    began = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(dataset: Path, folder: Path) -> float:
    """Of a run of one step in a new directory."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        words = ["train", CONFIG, "--workdir", f"{run}/run", "--dataset", dataset]
        words += ["--steps", "1", "--optimizer.warmup_steps", "0"]
        metrics = Path(run) / "run" / "metrics.jsonl"
        began = time.perf_counter()
        variables = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            env=os.environ | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        _, said = process.communicate()
        if process.returncode:
            sys.exit(said.decode().strip().splitlines()[-1])
        return seconds


def open_large(dataset: Path) -> float:
    """In a process of its own, imports not counted."""
    result = run_alone("benchmarks.startup", {"dataset": str(dataset)})
    if "failed" in result:
        sys.exit(result["failed"])
    return float(result["seconds"])


def run_case(case: dict[str, str]) -> dict[str, float]:
    from lit_fast.config import StreamConfig
    from lit_fast.data.dataset import open_dataset
    from lit_fast.data.features import open_features
    from lit_fast.data.tokens import open_tokens
    from lit_fast.train.input_pipeline.stream import open_stream

    began = time.perf_counter()
    dataset = open_dataset(case["dataset"])
    open_stream(open_features(dataset), open_tokens(dataset), StreamConfig(), 0)
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="embedded and tokenized, one tower and one tokenizer")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(json.loads(args.case))))
        return
    print(describe("jax", "flax", "tensorstore"))
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place).absolute()
        dataset, large = args.dataset, folder / "large"
        if not dataset:
            from tests.synthetic import make_dataset

            with redirect_stdout(sys.stderr):
                dataset = make_dataset(folder / "small", 6000, width=192, captions=5, max_length=24).path
        make_linked_store(large, args.rows, 64)
        first_step(dataset, folder)  # compiles
        print(f"\n| from the command to | s, median of {args.repeats} | lowest - highest | goal |")
        print("|---|---|---|---|")
        for name, goal, case in (
            ("the text of lit-fast --help", 0.3, show_help),
            ("the first step of lit-fast train, compiled before", 10.0, lambda: first_step(dataset, folder)),
            (f"an open stream over {args.rows:,} rows", 1.0, lambda: open_large(large)),
        ):
            seconds = sorted(case() for _ in range(args.repeats))
            middle = statistics.median(seconds)
            print(f"| {name} | {middle:.2f} | {seconds[0]:.2f} - {seconds[-1]:.2f} | {goal} |", flush=True)


if __name__ == "__main__":
    main()
