"""Effect of batches of nearest-neighbour groups on retrieval (section 4.8 of the paper), on real photos, small.

    python -m benchmarks.neighbours --dataset D --dev E [--tower NAME] [--runs DIR] [--seeds 0,1,2]

D and E are embedded as the header of configs/flickr8k_cpu.toml says. Every run is `lit-fast train` with that recipe,
cut to 200 steps of 512, half as wide and without dropout, its captions packed by their lengths; finished runs are
reused. The table has the mean of the seeds and, after ±, the standard deviation; in parentheses the difference to
random batches of the same seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.learning import METRICS, train
from benchmarks.machine import describe

STEPS = 200


class Setting(NamedTuple):
    """One line of the table."""

    neighbours: int
    mask_cosine: float = 0.0  # images from this cosine on are near-duplicates, which are masked; 0: none

    @property
    def name(self) -> str:
        """Name of the run directories, without the seed."""
        return f"neighbours{self.neighbours}-mask{self.mask_cosine:g}"

    @property
    def description(self) -> str:
        """The first column of the table."""
        groups = f"groups of {self.neighbours}" if self.neighbours else "random"
        return groups + (f", masked from cosine {self.mask_cosine:g}" if self.mask_cosine else "")

    def options(self) -> list[str]:
        """Return the flags of a run."""
        options = {
            "steps": STEPS,
            "optimizer.warmup_steps": STEPS // 20,
            "text.width": 96,
            "text.dropout": 0,
            "text.pack": 8,
            "stream.neighbours": self.neighbours,
            "evaluate.every_steps": 0,
            "checkpoint.every_steps": STEPS,
            "log.every_steps": STEPS // 10,
            "log.report_to": "",
        }
        if self.mask_cosine:
            options |= {"loss.near_duplicates": "mask", "loss.near_duplicate_cosine": self.mask_cosine}
        return [f"--{key}={value}" for key, value in options.items()]


SETTINGS = (Setting(0), Setting(2), Setting(8), Setting(8, 0.7))


def cell(values: Sequence[float], base: Sequence[float]) -> str:
    """Format mean and standard deviation of a metric, and of its differences to random batches."""

    def spread(x: Sequence[float]) -> float:
        return statistics.stdev(x) if len(x) > 1 else float("nan")

    differences = [a - b for a, b in zip(values, base, strict=True)]
    text = f"{statistics.mean(values):.1f} ± {spread(values):.1f}"
    if any(differences):
        text += f" ({statistics.mean(differences):+.1f} ± {spread(differences):.1f})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--tower", default="", help="name of the features; default: the only ones")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/neighbours"))
    args = parser.parse_args()
    options = [f"--dataset={args.dataset}", f"--evaluate.retrieval={args.dev}", f"--tower={args.tower}"]
    found: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in SETTINGS}
    for seed in map(int, args.seeds.split(",")):
        for setting in SETTINGS:
            found[setting].append(train(setting, seed, args.runs, options))
    print(f"{describe('jax', 'optax')}\n\n| batches | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for setting, figures in found.items():
        columns = [
            cell([f[metric] for f in figures], [f[metric] for f in found[SETTINGS[0]]])
            for metric in METRICS.values()
        ]
        print(f"| {setting.description} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
