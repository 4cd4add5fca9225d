"""Compare zero-shot classification and retrieval with the code of open_clip and CLIP_benchmark.

    python -m benchmarks.evaluate [--images 50000] [--classes 1000] [--width 768] [--repeats 3] [--no-growth]

All start from the same random embeddings, those of images near those of their classes and texts; towers are not
measured. Retrieval has a tenth of the images, with five texts each. The last tables and benchmarks/evaluate.svg show
the growth of time and memory with images, classes and texts. Memory is the peak beyond the embeddings. A call of more
than ten seconds is not repeated. Needs torch, open_clip_torch and clip_benchmark.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.evaluate_rivals import (
    RECALLS,
    Evaluation,
    Figures,
    clip_benchmark_accuracies,
    clip_benchmark_recalls,
    open_clip_accuracies,
    open_clip_recalls,
)
from benchmarks.machine import Cost, describe, measure
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.evaluation.bootstrap import bootstrap, point_estimates
from lit_fast.evaluation.evaluate import retrieval_evaluation, zero_shot_evaluation
from lit_fast.evaluation.ranks import ranks
from lit_fast.evaluation.retrieval import recall_table, recalls, retrieval_ranks
from lit_fast.evaluation.zeroshot import accuracies, accuracy_table

TEXTS = 5
NOISE = 8.0  # length of the noise added to unit vectors: figures well between chance and one
ENOUGH = 10.0  # seconds

GROWING_IMAGES = (5_000, 50_000, 500_000)  # with 1000 classes
GROWING_CLASSES = (100, 1_000, 10_000)  # with 50 000 images
GROWING_PAIRS = (1_000, 10_000, 100_000)  # images with one text each
MOST_PAIRS = 10_000  # for open_clip and CLIP_benchmark, which store the matrix of all scores

OURS, OPEN_CLIP, CLIP_BENCHMARK = "ours, figures", "open_clip", "CLIP_benchmark"
Cases = dict[str, Evaluation]


# --- data


def unit(x: np.ndarray) -> np.ndarray:
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def random_units(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    return unit(rng.standard_normal((count, width), np.float32))


def near(rng: np.random.Generator, x: np.ndarray, distance: float) -> np.ndarray:
    """Return unit vectors around those of x."""
    out = random_units(rng, *x.shape)
    out *= distance
    out += x
    return unit(out)


def make_dataset(path: Path, rows: int, classes: int = 0, texts: int = 0) -> Dataset:
    """Write rows whose labels or captions are numbers; evaluation needs no pictures."""
    rng = np.random.default_rng(0)
    writer = DatasetWriter(path)
    for r in range(rows):
        captions = tuple(f"text {texts * r + i}" for i in range(texts))
        writer.add(Row(f"{r:09d}", 0, 0, 0, captions, int(rng.integers(classes)) if classes else -1))
    writer.finish(seed=0, sources=[], classnames=[f"class {i}" for i in range(classes)])
    return open_dataset(path)


def number(text: str) -> int:
    return int(text.split()[1])


# --- ours


def our_table(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return accuracy_table(ranks(images, classes, np.arange(len(labels)), labels), labels)


def our_accuracies(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> Figures:
    return point_estimates(partial(accuracies, len(classes)), our_table(images, classes, labels))


def our_recalls(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> Figures:
    table = recall_table(*retrieval_ranks(images, texts, owner), owner)
    return {name: float(value[0]) for name, value in recalls(table.sum(axis=0, keepdims=True)).items()}


# --- the tables


def print_table(title: str, cases: Cases, names: Sequence[str], repeats: int) -> None:
    """Print costs and figures, and the largest difference between figures of the same name."""
    header = " | ".join(name.replace("_retrieval_recall", " R").replace("_", " ") for name in names)
    print(f"\n{title}\n\n| | seconds, median | lowest - highest | repeats | memory, MiB | {header} |")
    print(f"|---|---|---|---|---|{'---|' * len(names)}")
    found = []
    for case, function in cases.items():
        cost, figures = measure_figures(function, repeats)
        cells = [f"{100 * figures[name]:.3f}" if name in figures else "" for name in names]
        print(
            f"| {case} | {cost.median:.3f} | {cost.spread} | {cost.repeats} | {cost.memory / 2**20:,.0f} "
            f"| {' | '.join(cells)} |",
            flush=True,
        )
        found.append(figures)
    print_difference([found])


def print_difference(groups: Sequence[Sequence[Figures]]) -> None:
    """Print the largest difference between figures of the same name within a group."""
    worst = 0.0
    for found in groups:
        for name in {name for figures in found for name in figures}:
            values = [figures[name] for figures in found if name in figures]
            worst = max(worst, max(values) - min(values))
    # Figures are ratios of whole numbers; float64 and float32 division may differ.
    print("\nAll figures are equal." if worst < 1e-7 else f"\nFigures differ by up to {100 * worst:.4f} %.")


def measure_figures(function: Callable[[], Figures], repeats: int) -> tuple[Cost, Figures]:
    figures: Figures = {}
    cost = measure(lambda: figures.update(function()), repeats, enough=ENOUGH)
    return cost, figures


def classification(path: Path, rows: int, count: int, width: int, repeats: int) -> None:
    rng = np.random.default_rng(1)
    dataset = make_dataset(path, rows, classes=count)
    labels = np.array([label for block in dataset.iter_blocks() for label in block.labels])
    classes = random_units(rng, count, width)
    images = near(rng, classes[labels], NOISE)
    table = our_table(images, classes, labels)

    def our_command() -> Figures:
        evaluate = zero_shot_evaluation(dataset)
        embed_text = lambda texts: classes[[number(t) for t in texts]]  # noqa: E731
        return evaluate(np.arange(rows), images, embed_text)[0]["metrics"]

    def intervals() -> Figures:
        bootstrap(partial(accuracies, count), table)
        return {}

    cases: Cases = {
        OURS: partial(our_accuracies, images, classes, labels),
        "ours, their 95 % intervals": intervals,
        "ours, `lit-fast eval` without the towers": our_command,
        OPEN_CLIP: open_clip_accuracies(images, classes, labels),
        CLIP_BENCHMARK: clip_benchmark_accuracies(images, classes, labels, path / "classes.pt"),
    }
    title = f"Zero-shot: {rows:,} images, {count:,} classes, width {width}"
    print_table(title, cases, ["acc1", "acc5", "mean_per_class_recall"], repeats)


def retrieval(path: Path, rows: int, width: int, repeats: int) -> None:
    rng = np.random.default_rng(2)
    dataset = make_dataset(path, rows, texts=TEXTS)
    numbers = [[number(t) for t in captions] for block in dataset.iter_captions() for captions in block]
    order, owner = np.concatenate(numbers), np.repeat(np.arange(rows), TEXTS)
    images = random_units(rng, rows, width)
    texts = np.empty((len(order), width), np.float32)  # by number
    texts[order] = near(rng, images[owner], NOISE)

    def our_command() -> Figures:
        evaluate = retrieval_evaluation(dataset)
        embed_text = lambda captions: texts[[number(t) for t in captions]]  # noqa: E731
        return evaluate(np.arange(rows), images, embed_text)[0]["metrics"]

    cases: Cases = {
        OURS: partial(our_recalls, images, texts[order], owner),
        "ours, `lit-fast eval` without the towers": our_command,
        CLIP_BENCHMARK: clip_benchmark_recalls(images, texts, numbers),
    }
    print_table(f"Retrieval: {rows:,} images, {len(texts):,} texts, width {width}", cases, RECALLS, repeats)


# --- growth


def labelled(folder: Path, count: int, classes_count: int, width: int) -> Cases:
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.arange(count) % classes_count)
    classes = random_units(rng, classes_count, width)
    images = near(rng, classes[labels], NOISE)
    return {
        OURS: partial(our_accuracies, images, classes, labels),
        OPEN_CLIP: open_clip_accuracies(images, classes, labels),
        CLIP_BENCHMARK: clip_benchmark_accuracies(images, classes, labels, folder / "classes.pt"),
    }


def paired(count: int, width: int) -> Cases:
    """Return the cases of retrieval with one text per image, the only case in open_clip."""
    rng = np.random.default_rng(4)
    images = random_units(rng, count, width)
    texts = near(rng, images, NOISE)
    numbers = np.arange(count)
    cases: Cases = {OURS: partial(our_recalls, images, texts, numbers)}
    if count <= MOST_PAIRS:
        cases[OPEN_CLIP] = open_clip_recalls(images, texts)
        cases[CLIP_BENCHMARK] = clip_benchmark_recalls(images, texts, numbers[:, None].tolist())
    return cases


def grow(
    title: str, unit_name: str, sizes: Iterable[int], make: Callable[[int], Cases], repeats: int
) -> dict[str, dict[int, Cost]]:
    """Print and return the costs of every case by size."""
    names = (OURS, OPEN_CLIP, CLIP_BENCHMARK)
    print(f"\n{title}\n\n| {unit_name} | {' | '.join(f'{n}: seconds | MiB' for n in names)} |")
    print(f"|---|{'---|---|' * len(names)}")
    costs: dict[str, dict[int, Cost]] = {name: {} for name in names}
    groups = []
    for size in sizes:
        cells: list[str] = []
        found: list[Figures] = []
        cases = make(size)
        for name in names:
            if name not in cases:
                cells.append("not run | ")
                continue
            cost, figures = measure_figures(cases[name], repeats)
            costs[name][size] = cost
            found.append(figures)
            cells.append(f"{cost.median:.3f} ({cost.spread}) | {cost.memory / 2**20:,.0f}")
        print(f"| {size:,} | {' | '.join(cells)} |", flush=True)
        groups.append(found)
    print_difference(groups)
    return costs


def plot(panels: dict[str, dict[str, dict[int, Cost]]], out: Path) -> None:
    """Plot seconds above memory over each of the sizes, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure((8.4, 4.6), layout="constrained")
    grid = figure.subplots(2, len(panels), sharex="col", sharey="row")
    for column, (label, costs) in enumerate(panels.items()):
        seconds, memory = grid[:, column]
        for name, found in costs.items():
            seconds.plot(list(found), [c.median for c in found.values()], marker="o", label=name)
            memory.plot(list(found), [max(1, c.memory / 2**20) for c in found.values()], marker="o")
        for axes in (seconds, memory):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
        memory.set_xlabel(label)
    grid[0, 0].set_ylabel("seconds")
    grid[1, 0].set_ylabel("MiB beyond the embeddings")
    grid[0, 0].legend(fontsize="small")
    figure.savefig(out, metadata={"Date": None})


def growth(folder: Path, width: int, repeats: int) -> None:
    images = grow(
        f"Zero-shot over the images, 1,000 classes, width {width}",
        "images",
        GROWING_IMAGES,
        lambda size: labelled(folder, size, 1_000, width),
        repeats,
    )
    classes = grow(
        f"Zero-shot over the classes, 50,000 images, width {width}",
        "classes",
        GROWING_CLASSES,
        lambda size: labelled(folder, 50_000, size, width),
        repeats,
    )
    both = grow(
        f"Retrieval over the images, one text each, width {width}",
        "images",
        GROWING_PAIRS,
        lambda size: paired(size, width),
        repeats,
    )
    panels = {
        "images of 1,000 classes": images,
        "classes of 50,000 images": classes,
        "images with a text each": both,
    }
    plot(panels, Path(__file__).with_name("evaluate.svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-growth", action="store_true", help="only the first two tables")
    args = parser.parse_args()
    print(describe("numpy", "torch", "open_clip_torch", "clip_benchmark"))
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        classification(folder / "labelled", args.images, args.classes, args.width, args.repeats)
        retrieval(folder / "captioned", max(20, args.images // 10), args.width, args.repeats)
        if not args.no_growth:
            growth(folder, args.width, args.repeats)


if __name__ == "__main__":
    main()
