"""Effect of the loss and its initial values on retrieval: the paper's table 4 and figure 2, on real photos, small.

    python -m benchmarks.learning --dataset D --dev E --zero-shot Z [--tokenizer NAME] [--runs DIR]

Embed D, E and Z as the header of configs/flickr8k_cpu.toml says (its training split, its dev split, a labelled set).
Every run is `lit-fast train` with that recipe, cut to 102 400 pairs and without dropout; finished runs are reused.
Tables have the mean of three seeds and, after ±, the standard deviation.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from benchmarks.machine import describe

CONFIG = Path(__file__).parents[1] / "configs" / "flickr8k_cpu.toml"
PAIRS = 102_400
SEEDS = (0, 1, 2)
BATCH = 512
BATCHES = (64, 256, 512, 2048)
LOSSES = ("sigmoid", "softmax")
# (bias, temperature) at the start, in the paper's order; no bias: None.
INITIAL: tuple[tuple[float | None, float], ...] = ((None, 10), (-10, 10), (-10, 1), (0, 10), (0, 1))


class Setting(NamedTuple):
    """One line of a table."""

    batch: int
    loss: str
    bias: float | None
    temperature: float

    @property
    def name(self) -> str:
        """Name of the run directories, without the seed."""
        return f"{self.loss}-batch{self.batch}-bias{self.bias}-temperature{self.temperature:g}"

    def options(self) -> list[str]:
        """Return the flags of a run; the learning rate grows with the square root of the batch."""
        steps = PAIRS // self.batch
        options = {
            "steps": steps,
            "stream.global_batch": self.batch,
            "optimizer.learning_rate": 1e-3 * math.sqrt(self.batch / BATCH),
            "optimizer.warmup_steps": steps // 20,
            "text.dropout": 0,
            "loss.name": self.loss,
            "loss.temperature_init": self.temperature,
            "evaluate.every_steps": 0,
            "checkpoint.every_steps": steps,
            "log.every_steps": max(1, steps // 10),
        }
        if self.loss == "sigmoid":
            options |= {"loss.bias": "false"} if self.bias is None else {"loss.bias_init": self.bias}
        return [f"--{key}={value}" for key, value in options.items()]


def table_4() -> list[Setting]:
    return [Setting(BATCH, "sigmoid", bias, temperature) for bias, temperature in INITIAL]


def figure_2() -> list[Setting]:
    bias = {"sigmoid": -10.0, "softmax": None}
    return [Setting(batch, loss, bias[loss], 10) for batch in BATCHES for loss in LOSSES]


class Run(Protocol):
    """The setting of a run."""

    @property
    def name(self) -> str: ...

    def options(self) -> list[str]: ...


def train(setting: Run, seed: int, runs: Path, options: Sequence[str]) -> dict[str, float]:
    """Train a run unless it is finished; return its metrics in per cent."""
    run = runs / f"{setting.name}-seed{seed}"
    receipt = run / "receipt.json"
    if not receipt.is_file() or json.loads(receipt.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "lit_fast", "train", str(CONFIG), "--workdir", str(run)]
        done = subprocess.run(
            [*command, *setting.options(), *options, f"--seed={seed}"], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{run}: {done.stderr.strip().splitlines()[-1]}")
        print(f"{run.name} trained", file=sys.stderr, flush=True)
    results = json.loads(receipt.read_text())["evaluation"]["results"]
    return {name: 100 * value for result in results for name, value in result["metrics"].items()}


METRICS = {
    "text to image R@1": "image_retrieval_recall@1",
    "R@10": "image_retrieval_recall@10",
    "image to text R@1": "text_retrieval_recall@1",
    "zero-shot top-1": "acc1",
}


def measure(settings: Sequence[Setting], runs: Path, options: Sequence[str]) -> dict[Setting, list[dict]]:
    """Return the metrics of every seed by setting; all settings of one seed are run before the next seed."""
    found: dict[Setting, list[dict]] = {setting: [] for setting in settings}
    for seed in SEEDS:
        for setting in settings:
            found[setting].append(train(setting, seed, runs, options))
    return found


def cells(figures: Sequence[dict[str, float]]) -> str:
    """Format mean and standard deviation of every metric."""
    columns = [[f[metric] for f in figures] for metric in METRICS.values()]
    return " | ".join(f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns)


def plot(found: dict[Setting, list[dict]], out: Path) -> None:
    """Plot recall over the batch for both losses, with the standard deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for loss in LOSSES:
        values = [[f["image_retrieval_recall@1"] for f in v] for s, v in found.items() if s.loss == loss]
        means, spread = [statistics.mean(v) for v in values], [statistics.stdev(v) for v in values]
        axes.errorbar(BATCHES, means, spread, marker="o", capsize=3, label=loss)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCHES, [f"{b:,}" for b in BATCHES])
    axes.set(xlabel="batch", ylabel="text to image recall@1, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--zero-shot", required=True)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    options = [
        f"--dataset={args.dataset}",
        f"--tokenizer={args.tokenizer}",
        f"--evaluate.retrieval={args.dev}",
        f"--evaluate.zero_shot={args.zero_shot}",
    ]
    initial = measure(table_4(), args.runs, options)
    header = " | ".join(METRICS)
    print(
        f"{describe('jax', 'optax')}\n\n| bias | temperature | {header} |\n|---|---|{'---|' * len(METRICS)}"
    )
    for setting, figures in initial.items():
        bias = "none" if setting.bias is None else f"{setting.bias:g}"
        print(f"| {bias} | {setting.temperature:g} | {cells(figures)} |", flush=True)
    losses = measure(figure_2(), args.runs, options)
    print(f"\n| batch | loss | {header} |\n|---|---|{'---|' * len(METRICS)}")
    for setting, figures in losses.items():
        print(f"| {setting.batch:,} | {setting.loss} | {cells(figures)} |")
    plot(losses, Path(__file__).with_name("learning.svg"))


if __name__ == "__main__":
    main()
