"""Zero-shot classification and retrieval beside open_clip's and CLIP_benchmark's own code, on the same embeddings.

    python -m benchmarks.evaluate [--images 50000] [--classes 1000] [--width 768] [--repeats 3]

The towers are left out: everything starts from embeddings, random ones whose images lie near their classes and
texts. Retrieval has a tenth of the images, five texts each. Needs torch, open_clip_torch and clip_benchmark; they
are given batches of 1024 for classification and, in retrieval, CLIP_benchmark's default of 64, because its memory
grows with the batch. open_clip's retrieval is for one text per image, so it has a table of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from open_clip_train import zero_shot as open_clip_zero_shot
from open_clip_train.train import get_clip_metrics

from benchmarks.machine import describe
from lit_fast.dataset import Dataset, DatasetWriter, Row, open_dataset
from lit_fast.evaluation.bootstrap import bootstrap, measured
from lit_fast.evaluation.evaluate import retrieval_evaluation, zero_shot_evaluation
from lit_fast.evaluation.ranks import ranks
from lit_fast.evaluation.retrieval import recall_table, recalls, retrieval_ranks
from lit_fast.evaluation.zeroshot import accuracies, accuracy_table

# Both make numbers of arrays of one element by `float`, which numpy 2.4 refuses.
for module in (open_clip_zero_shot, zeroshot_classification):
    module.float = lambda value: float(np.asarray(value).item())

TEXTS, BATCH, RETRIEVAL_BATCH = 5, 1024, 64
RECALL_AT = [1, 5, 10]
NOISE = 8.0  # the length of what is added to unit vectors: figures well between chance and one

Figures = dict[str, float]


# --- what is measured on


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def near(rng: np.random.Generator, x: np.ndarray, distance: float) -> np.ndarray:
    """Unit vectors around those of x."""
    return unit(x + distance * unit(rng.standard_normal(x.shape, np.float32)))


def make_dataset(path: Path, rows: int, classes: int = 0, texts: int = 0) -> Dataset:
    """Rows with labels or captions that are numbers; no picture is needed to evaluate."""
    rng = np.random.default_rng(0)
    writer = DatasetWriter(path)
    for r in range(rows):
        captions = tuple(f"text {texts * r + i}" for i in range(texts))
        writer.add(Row(f"{r:09d}", 0, 0, 0, captions, int(rng.integers(classes)) if classes else -1))
    writer.finish(seed=0, sources=[], classnames=[f"class {i}" for i in range(classes)])
    return open_dataset(path)


def number(text: str) -> int:
    return int(text.split()[1])


class Identity:
    """A model whose inputs are embeddings, as CLIP_benchmark calls one."""

    def encode_image(self, x: torch.Tensor) -> torch.Tensor:
        return x

    encode_text = encode_image


class Batches:
    """A loader of (images, labels or lists of texts)."""

    def __init__(self, images: torch.Tensor, others: Sequence[Any], batch: int, classes: int = 0) -> None:
        self.images, self.others, self.batch = images, others, batch
        self.dataset = SimpleNamespace(classes=range(classes))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        for lo in range(0, len(self.images), self.batch):
            yield self.images[lo : lo + self.batch], self.others[lo : lo + self.batch]


# --- measuring


def measure(function: Callable[[], Figures], repeats: int) -> tuple[list[float], Figures]:
    """Seconds of every call after one for warming up, rising, and the figures."""
    figures = function()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds), figures


def print_table(
    title: str, cases: dict[str, Callable[[], Figures]], names: Sequence[str], repeats: int
) -> None:
    """Seconds and figures; and what the figures of all that have them differ by."""
    header = " | ".join(name.replace("_retrieval_recall", " R").replace("_", " ") for name in names)
    print(f"\n{title}\n\n| | seconds, median of {repeats} | lowest - highest | {header} |")
    print(f"|---|---|---|{'---|' * len(names)}")
    found: dict[str, list[float]] = {name: [] for name in names}
    for case, function in cases.items():
        seconds, figures = measure(function, repeats)
        cells = [f"{100 * figures[name]:.3f}" if name in figures else "" for name in names]
        spread = f"{seconds[0]:.3f} - {seconds[-1]:.3f}"
        print(f"| {case} | {statistics.median(seconds):.3f} | {spread} | {' | '.join(cells)} |", flush=True)
        for name in found.keys() & figures.keys():
            found[name].append(figures[name])
    worst = max(max(values) - min(values) for values in found.values())
    # Figures are ratios of whole numbers: what float64 and float32 division differ by is no difference.
    print("\nAll figures are equal." if worst < 1e-7 else f"\nFigures differ by up to {100 * worst:.4f} %.")


# --- the tables


def classification(path: Path, rows: int, count: int, width: int, repeats: int) -> None:
    rng = np.random.default_rng(1)
    dataset = make_dataset(path, rows, classes=count)
    labels = np.array([label for block in dataset.iter_blocks() for label in block.labels])
    classes = unit(rng.standard_normal((count, width), np.float32))
    images = near(rng, classes[labels], NOISE)

    figures = partial(accuracies, count)

    def table() -> np.ndarray:
        return accuracy_table(ranks(images, classes, np.arange(rows), labels), labels)

    made = table()

    def ours_whole() -> Figures:
        evaluate = zero_shot_evaluation(dataset)
        embed_text = lambda texts: classes[[number(t) for t in texts]]  # noqa: E731
        return evaluate(np.arange(rows), images, embed_text)[0]["metrics"]

    def intervals() -> Figures:
        bootstrap(figures, made)
        return {}

    their_images, their_labels = torch.from_numpy(images), torch.from_numpy(labels)
    their_classes = torch.from_numpy(classes).T.contiguous()
    file = path / "classes.pt"
    torch.save(their_classes, file)

    def open_clip() -> Figures:
        loader = Batches(their_images, their_labels, BATCH)
        args = SimpleNamespace(device="cpu", precision="fp32", batch_size=BATCH)
        acc1, acc5 = open_clip_zero_shot.run(lambda image: (image,), their_classes, loader, args)
        return {"acc1": acc1, "acc5": acc5}

    def clip_benchmark() -> Figures:
        loader = Batches(their_images, their_labels, BATCH, count)
        return zeroshot_classification.evaluate(
            Identity(), loader, None, None, None, "cpu", amp=False, load_clfs=[str(file)]
        )

    cases = {
        "ours, figures": lambda: measured(figures, table()),
        "ours, their 95 % intervals": intervals,
        "ours, `lit-fast eval` without the towers": ours_whole,
        "open_clip": open_clip,
        "CLIP_benchmark": clip_benchmark,
    }
    title = f"Zero-shot: {rows:,} images, {count:,} classes, width {width}"
    print_table(title, cases, ["acc1", "acc5", "mean_per_class_recall"], repeats)


def retrieval(path: Path, rows: int, width: int, repeats: int) -> None:
    rng = np.random.default_rng(2)
    dataset = make_dataset(path, rows, texts=TEXTS)
    numbers = [[number(t) for t in captions] for block in dataset.iter_captions() for captions in block]
    order, owner = np.concatenate(numbers), np.repeat(np.arange(rows), TEXTS)
    images = unit(rng.standard_normal((rows, width), np.float32))
    texts = np.empty((len(order), width), np.float32)  # by number
    texts[order] = near(rng, images[owner], NOISE)

    def ours() -> Figures:
        evaluate = retrieval_evaluation(dataset)
        embed_text = lambda given: texts[[number(t) for t in given]]  # noqa: E731
        return evaluate(np.arange(rows), images, embed_text)[0]["metrics"]

    def ours_figures() -> Figures:
        table = recall_table(*retrieval_ranks(images, texts[order], owner), owner)
        return {name: float(value[0]) for name, value in recalls(table.sum(axis=0, keepdims=True)).items()}

    def clip_benchmark() -> Figures:
        their_texts = torch.from_numpy(texts)
        loader = Batches(torch.from_numpy(images), numbers, RETRIEVAL_BATCH)
        tokenizer = lambda given: their_texts[given]  # noqa: E731
        return zeroshot_retrieval.evaluate(
            Identity(), loader, tokenizer, "cpu", amp=False, recall_k_list=RECALL_AT
        )

    names = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in RECALL_AT]
    cases = {
        "ours, figures": ours_figures,
        "ours, `lit-fast eval` without the towers": ours,
        "CLIP_benchmark": clip_benchmark,
    }
    print_table(f"Retrieval: {rows:,} images, {len(texts):,} texts, width {width}", cases, names, repeats)

    first = texts[[captions[0] for captions in numbers]]
    text_names, image_names = names[:3], names[3:]

    def ours_single() -> Figures:
        found = retrieval_ranks(images, first, np.arange(rows))
        return {
            name: float((rank < k).mean())
            for rank, group in zip(found, (text_names, image_names), strict=True)
            for name, k in zip(group, RECALL_AT, strict=True)
        }

    def open_clip() -> Figures:
        got = get_clip_metrics(torch.from_numpy(images), torch.from_numpy(first), 100.0)
        ways = (("text_to_image", text_names), ("image_to_text", image_names))
        return {
            name: float(got[f"{way}_R@{k}"])
            for way, group in ways
            for name, k in zip(group, RECALL_AT, strict=True)
        }

    print_table(
        f"Retrieval: {rows:,} images, one text each",
        {"ours": ours_single, "open_clip": open_clip},
        names,
        repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(describe("numpy", "torch", "open_clip_torch", "clip_benchmark"))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        classification(Path(folder) / "labelled", args.images, args.classes, args.width, args.repeats)
        retrieval(Path(folder) / "captioned", max(20, args.images // 10), args.width, args.repeats)


if __name__ == "__main__":
    main()
