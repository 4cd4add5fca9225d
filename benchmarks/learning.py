"""The paper's experiments on the loss, small, on real photos: each table trains the same small tower in other ways.

    python -m benchmarks.learning --dataset D --dev E --noise N [--only TABLE,...] [--seeds N] [--jobs N]
        [--runs DIR]

Embed D and E as the header of configs/flickr8k_cpu.toml says (its training split and its dev split), and N, which is
`lit-fast index noise:1024 --out N`, with the same options. Every run is
`lit-fast train` with that recipe and a text tower of a third of its width, so that a run is long enough to converge:
as many pairs as the recipe's, 20 times every caption. Figures are recall on the dev split in percent: the mean of the
seeds and, after ±, the standard deviation. Finished runs are reused.

Tables:
  length      the recipe for other numbers of pairs: whether the runs of the other tables have converged
  initial     initial bias and temperature (table 4)
  batch       sigmoid and softmax over the batch (figure 2)
  beta2       Adam's decay of the second moment (figure 5)
  negatives   masked negatives (figure 6)
  corruption  sigmoid and softmax with corrupted images, texts and pairs (figure 7); needs --noise
  padding     padding masked or attended to, as the paper does, and the pooling
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.machine import describe

CONFIG = Path(__file__).parents[1] / "configs" / "flickr8k_cpu.toml"
PAIRS = 614_400
BATCH = 512
BATCHES = (128, 512, 2048)
LOSSES = ("sigmoid", "softmax")
CORRUPTED = ("images", "texts", "alignment", "images, texts")
METRICS = {
    "text to image R@1": "image_retrieval_recall@1",
    "R@10": "image_retrieval_recall@10",
    "image to text R@1": "text_retrieval_recall@1",
    "image to text R@10": "text_retrieval_recall@10",
}


class Setting(NamedTuple):
    """One line of a table: what differs from the recipe."""

    cells: tuple[str, ...]  # the first columns
    changes: tuple[tuple[str, Any], ...] = ()
    batch: int = BATCH
    pairs: int = PAIRS

    @property
    def name(self) -> str:
        """Name of the run directories, without the seed."""
        changes = [f"{key.rpartition('.')[2]}-{value}" for key, value in self.changes]
        return "-".join([f"pairs{self.pairs}-batch{self.batch}", *changes])

    def options(self) -> list[str]:
        """Return the flags of a run; the learning rate grows with the square root of the batch."""
        steps = self.pairs // self.batch
        options = {
            "steps": steps,
            "text.width": 64,
            "text.heads": 2,
            "text.pack": 8,
            "stream.global_batch": self.batch,
            "optimizer.learning_rate": 2e-3 * math.sqrt(self.batch / BATCH),
            "optimizer.warmup_steps": steps // 24,
            "optimizer.learning_rate_scale": "[tb]=10",  # temperature and bias
            "evaluate.every_steps": 0,
            "checkpoint.every_steps": steps,
            "log.every_steps": max(1, steps // 20),
            "log.report_to": "",
        } | dict(self.changes)
        return [f"--{key}={value}" for key, value in options.items()]


def loss(name: str) -> tuple[tuple[str, Any], ...]:
    return (("loss.name", name),) if name != "sigmoid" else ()


def initial(bias: float | None, temperature: float, rate: int = 10) -> Setting:
    """Return the line of initial values; `rate` is the factor of their learning rate."""
    key = ("loss.bias", "false") if bias is None else ("loss.bias_init", bias)
    changes = [] if (bias, temperature) == (-10, 10) else [key, ("loss.temperature_init", temperature)]
    changes += [("optimizer.learning_rate_scale", f"[tb]={rate}")] if rate != 10 else []
    cells = ("none" if bias is None else f"{bias:g}", f"{temperature:g}", str(rate))
    return Setting(cells, tuple(changes))


def masked(kind: str, count: float) -> Setting:
    changes = (("loss.negatives", kind), ("loss.negatives_per_positive", count))
    return Setting((kind, f"{count:g}"), changes)


def padded(masked: bool, pooling: str) -> Setting:
    # Dropout in packed rows needs masked padding.
    attended = (("text.mask_padding", "false"), ("text.pack", 1))
    changes: tuple[tuple[str, Any], ...] = () if masked else attended
    changes += (("text.pooling", pooling),) if pooling != "mean" else ()
    return Setting(("masked" if masked else "attended to", pooling), changes)


def corrupted(loss_name: str, kinds: str, share: float) -> Setting:
    changes = [(f"stream.corrupt_{kind}", share) for kind in kinds.split(", ")]
    return Setting((kinds, f"{share:g}", loss_name), (*loss(loss_name), *changes))


# Title of each table's first columns, and its lines.
TABLES: dict[str, tuple[tuple[str, ...], list[Setting]]] = {
    "length": (
        ("pairs", "loss"),
        [
            Setting((f"{PAIRS * part // 4:,}", name), loss(name), pairs=PAIRS * part // 4)
            for part in (2, 4, 8)
            for name in LOSSES
        ],
    ),
    # In the paper's order.
    "initial": (
        ("bias", "temperature", "their learning rate, times"),
        [
            initial(None, 10),
            initial(None, 10, 1),
            initial(-10, 10),
            initial(-10, 1),
            initial(0, 10),
            initial(0, 1),
        ],
    ),
    "batch": (
        ("batch", "loss"),
        [Setting((f"{batch:,}", name), loss(name), batch=batch) for batch in BATCHES for name in LOSSES],
    ),
    "beta2": (
        ("beta2", "batch"),
        [
            Setting((str(b2), "2,048"), (("optimizer.b2", b2),) if b2 != 0.95 else (), batch=2048)
            for b2 in (0.999, 0.95)
        ],
    ),
    "negatives": (
        ("negatives", "per positive"),
        [Setting(("all", "511")), *(masked(kind, 16) for kind in ("random", "hardest", "easiest"))],
    ),
    "corruption": (
        ("corrupted", "share", "loss"),
        [Setting(("nothing", "0", name), loss(name)) for name in LOSSES]
        + [corrupted(name, kinds, 0.5) for kinds in CORRUPTED for name in LOSSES],
    ),
    "padding": (
        ("padding", "pooling"),
        [padded(masked, pooling) for masked in (True, False) for pooling in ("mean", "last")],
    ),
}


class Run(Protocol):
    """The setting of runs."""

    @property
    def name(self) -> str: ...

    def options(self) -> list[str]: ...


def train(
    setting: Run, seed: int, runs: Path, options: Sequence[str], cores: Sequence[int] = ()
) -> dict[str, float]:
    """Train a run unless it is finished, on these cores; return its metrics in per cent."""
    run = runs / f"{setting.name}-seed{seed}"
    receipt = run / "receipt.json"
    if not receipt.is_file() or json.loads(receipt.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "lit_fast", "train", str(CONFIG), "--workdir", str(run)]
        done = subprocess.run(
            [*command, *setting.options(), *options, f"--seed={seed}"],
            capture_output=True,
            text=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
        if done.returncode:
            raise SystemExit(f"{run}: {done.stderr.strip().splitlines()[-1]}")
        print(f"{run.name} trained", file=sys.stderr, flush=True)
    results = json.loads(receipt.read_text())["evaluation"]["results"]
    return {name: 100 * value for result in results for name, value in result["metrics"].items()}


def train_all(
    runs: list[tuple[Setting, int]], directory: Path, flags: Callable[[Setting], Sequence[str]], jobs: int
) -> None:
    """Train all runs, `jobs` at a time, each on its own share of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::jobs] for i in range(jobs)]

    def work(share: list[int]) -> None:
        while runs:
            setting, seed = runs.pop(0)
            train(setting, seed, directory, flags(setting), share)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, shares))


def cells(figures: Sequence[dict[str, float]]) -> str:
    """Format mean and standard deviation of every metric."""
    columns = [[f[metric] for f in figures] for metric in METRICS.values()]
    spread = lambda c: f" ± {deviation(c):.1f}" if len(c) > 1 else ""  # noqa: E731
    return " | ".join(f"{statistics.mean(c):.1f}{spread(c)}" for c in columns)


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot(found: dict[Setting, list[dict[str, float]]], out: Path) -> None:
    """Plot recall over the batch for both losses, with the standard deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure((5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in LOSSES:
        values = [[f["image_retrieval_recall@1"] for f in v] for s, v in found.items() if s.cells[1] == name]
        means, spread = [statistics.mean(v) for v in values], [deviation(v) for v in values]
        axes.errorbar(BATCHES, means, spread, marker="o", capsize=3, label=name)
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
    parser.add_argument("--noise", default="", help="dataset of the noise")
    parser.add_argument("--tower", default="")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--only", default=",".join(TABLES), help="names of tables")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    options = [
        f"--dataset={args.dataset}",
        f"--tower={args.tower}",
        f"--tokenizer={args.tokenizer}",
        f"--evaluate.retrieval={args.dev}",
    ]

    def flags(setting: Setting) -> list[str]:
        corrupts_images = any(key == "stream.corrupt_images" for key, _ in setting.changes)
        return [*options, f"--stream.noise={args.noise}"] if corrupts_images else options

    names = args.only.split(",")
    if "corruption" in names and not args.noise:
        parser.error("the table corruption needs --noise")
    settings = {setting.name: setting for name in names for setting in TABLES[name][1]}
    runs = [(s, seed) for seed in range(args.seeds) for s in settings.values()]
    train_all(runs, args.runs, flags, args.jobs)
    print(describe("jax", "optax"))
    for name in names:
        columns, lines = TABLES[name]
        header = [*columns, *METRICS]
        print(f"\n{name}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        found = {s: [train(s, seed, args.runs, flags(s)) for seed in range(args.seeds)] for s in lines}
        for setting, figures in found.items():
            print(f"| {' | '.join(setting.cells)} | {cells(figures)} |", flush=True)
        if name == "batch":
            plot(found, Path(__file__).with_name("learning.svg"))


if __name__ == "__main__":
    main()
