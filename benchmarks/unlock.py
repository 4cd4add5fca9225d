"""Effect of unlocking the image tower after SigLiT, with and without weight decay on it: the paper's figure 4, small.

    python -m benchmarks.unlock --dataset D --dev E --flowers TAR --tower FILE.npz --runs DIR [--epochs 3]
        [--seeds 0,1,2]

Prepare D and E with FILE.npz as the header of configs/flickr8k_cpu.toml says; TAR has labelled images; every second
one trains the few-shot classifier.
The SigLiT run is the recipe flickr8k_cpu, or is given with --siglit. Each further run starts from it:

    frozen      trains the text tower alone for as long
    unlocked    trains both towers; the image tower with a tenth of the learning rate and without weight decay
    decayed     the same, with weight decay on the image tower that shrinks its kernels by a third over the run, as 1e-4
                a step does over the paper's 146 000 steps several times

Finished runs are reused. The table has the means of the seeds and, after ±, their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

BATCH = 256
LEARNING_RATE = 3e-4
SHRINK = 0.4  # sum of the decays of all steps; exp(-0.4) is 0.67
ARMS = ("frozen", "unlocked", "decayed")
METRICS = {
    "text to image R@1": "image_retrieval_recall@1",
    "R@5": "image_retrieval_recall@5",
    "image to text R@1": "text_retrieval_recall@1",
    "10-shot flowers": "acc1_10shot",
}


def lit_fast(*arguments: object) -> None:
    """Run a command; end with its last line if it fails."""
    command = [sys.executable, "-m", "lit_fast", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")


def split_labelled(tar: Path, directory: Path) -> tuple[Path, Path]:
    """Index the even and the odd samples of a tar as two datasets."""
    datasets = directory / "flowers-train", directory / "flowers-test"
    if (datasets[1] / "dataset.json").is_file():
        return datasets
    with tarfile.open(tar) as source:
        members = sorted((m for m in source if m.isfile()), key=lambda m: m.name)
        stems = sorted({m.name.rpartition(".")[0] for m in members})
        for part, dataset in enumerate(datasets):
            chosen = set(stems[part::2])
            with tarfile.open(f"{dataset}.tar", "w") as target:
                for member in members:
                    if member.name.rpartition(".")[0] in chosen:
                        target.addfile(member, source.extractfile(member))
            names = tar.parents[1] / "classnames.txt"
            lit_fast("index", f"{dataset}.tar", "--out", dataset, "--classnames", names)
    return datasets


def options_of(arm: str, args: argparse.Namespace, steps: int) -> list[str]:
    """Return the flags of a run."""
    options: dict[str, Any] = {
        "dataset": args.dataset,
        "tower": args.features["name"],
        "steps": steps,
        "text.dtype": "auto",
        "stream.global_batch": BATCH,
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.warmup_steps": max(1, steps // 20),
        "text.init": args.siglit,
        "evaluate.retrieval": args.dev,
        "evaluate.every_steps": 0,
        "checkpoint.every_steps": steps,
        "log.every_steps": max(1, steps // 20),
    }
    if arm != "frozen":
        options |= {
            "image.train": "unlocked",
            "evaluate.few_shot": "=".join(map(str, args.flowers_datasets)),
        }
    if arm == "decayed":  # of the cosine schedule's mean, half of the steps
        factor = 2 * SHRINK / steps / 1e-4
        options["optimizer.weight_decay_scale"] = f"img/(?!head/).*kernel={factor:.6g},(.*/)?kernel=1"
    return [f"--{key}={value}" for key, value in options.items()]


def train(arm: str, seed: int, args: argparse.Namespace, steps: int) -> dict[str, float]:
    """Train a run unless it is finished; return its metrics in per cent, and its images per second."""
    run = args.runs / f"{arm}-seed{seed}-steps{steps}"
    receipt = run / "receipt.json"
    if not receipt.is_file() or json.loads(receipt.read_text())["status"] != "finished":
        options = options_of(arm, args, steps)
        lit_fast("train", "flickr8k_cpu", "--workdir", run, f"--seed={seed}", *options)
        print(f"{run.name} trained", file=sys.stderr, flush=True)
    return results_of(receipt)


def results_of(receipt: Path) -> dict[str, float]:
    """Return the metrics of a receipt in per cent, and its pairs per second."""
    value = json.loads(receipt.read_text())
    found = {"pairs/s": value["pairs_per_second"]} if "pairs_per_second" in value else {}
    for result in value["evaluation"]["results"]:
        found |= {name: 100 * v for name, v in result["metrics"].items() if isinstance(v, float)}
    return found


def table(arms: dict[str, list[dict[str, float]]]) -> str:
    """Return a table in Markdown."""
    names = METRICS | {"pairs/s": "pairs/s"}
    lines = [f"| run | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for arm, found in arms.items():
        cells = []
        for name in names.values():
            known = [metrics[name] for metrics in found if name in metrics]
            spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
            cells.append(f"{statistics.mean(known):.1f}{spread}" if known else "-")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("dataset", "dev", "flowers", "tower", "runs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--siglit", type=Path, help="a finished run on the features of D")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    args.flowers_datasets = split_labelled(args.flowers, args.runs)
    if args.siglit is None:
        args.siglit = args.runs / "siglit"
        if not (args.siglit / "receipt.json").is_file():
            lit_fast(
                "train", "flickr8k_cpu", "--workdir", args.siglit, "--dataset", args.dataset,
                "--evaluate.retrieval", args.dev,
            )  # fmt: skip
    args.features = json.loads((args.siglit / "tower.json").read_text())
    args.resolution = args.features["preprocess"]["size"]
    rows = json.loads((args.dataset / "dataset.json").read_text())["rows"]
    steps = max(2, round(args.epochs * rows / BATCH))
    print(describe("jax"), f"; {steps} steps of {BATCH}, {args.resolution} pixels", sep="", flush=True)
    found: dict[str, list[dict[str, float]]] = {"SigLiT": [results_of(args.siglit / "receipt.json")]}
    tower = args.runs / "tower.json"
    if not tower.is_file():  # the tower before: the features of the frozen one
        for dataset in args.flowers_datasets:
            lit_fast(
                "embed", dataset, "--tower", args.tower, "--preprocess", "tf-squash", "--resolution",
                args.resolution, "--name", args.features["name"], "--dtype", args.features["dtype"],
            )  # fmt: skip
        lit_fast("eval", args.siglit, "--few-shot", *args.flowers_datasets, "--json", tower)
    found["SigLiT"][0] |= {name: 100 * v for name, v in json.loads(tower.read_text())["metrics"].items()}
    for seed in map(int, args.seeds.split(",")):
        for arm in args.arms.split(","):
            found.setdefault(arm, []).append(train(arm, seed, args, steps))
            print(table(found), file=sys.stderr, flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
