"""Measure the rows per second of the input stream, of the machine and of other libraries.

    python -m benchmarks.stream [--rows 2000000] [--growth 10000 100000 1000000 10000000 100000000]

768-wide bfloat16 features with one caption of 16 tokens a row, batches of 32 768. Every line is measured in its
own process: 24 batches, after 24 batches that touch all memory. Cold: the files were dropped from the page cache.
The lines up to the gap only move bytes: they do not shuffle rows or read captions, and only TensorStore compares
checksums. The second table shows how the cost grows with the dataset; the larger ones are 64 wide and their shards are
hard links to one file. benchmarks/stream.svg plots both. Takes five minutes on two idle cores and 7 GB of disk under
--folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorstore as ts

from benchmarks.machine import describe, peak_memory, run_alone
from benchmarks.stream_store import LENGTH, forget, make_linked_store, make_store
from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK, SHARD, open_dataset
from lit_fast.data.features import BFLOAT16, open_features
from lit_fast.data.tokens import open_tokens
from lit_fast.train.input_pipeline.stream import Stream, open_stream

WIDTH, BATCH = 768, 32_768
NARROW = 64  # of the datasets that are linked
LINKED = 10_000_000  # rows from which on a dataset is linked
BATCHES, REPEATS = 24, 3  # as many again go before
MEMORY_GIB = 0.5  # of the second table: datasets of a million rows and more are streamed
CHUNK = BLOCK * WIDTH * 2 + 4  # bytes of a block with its checksum

Result = dict[str, Any]


def open_ours(path: Path, memory_gib: float, window_blocks: int = 8) -> Stream:
    dataset = open_dataset(path)
    config = StreamConfig(global_batch=BATCH, memory_gib=memory_gib, shuffle_window_blocks=window_blocks)
    return open_stream(open_features(dataset), open_tokens(dataset), config, 0)


def ours_in_memory(path: Path) -> Iterator:
    return open_ours(path, 1000.0).iterate(0)


def ours_windows(path: Path, blocks: int) -> Iterator:
    return open_ours(path, 0.0, blocks).iterate(0)


def copy(path: Path) -> Iterator:
    """Copy the bytes of a batch in memory."""
    source, target = np.zeros((BATCH, WIDTH), np.uint16), np.zeros((BATCH, WIDTH), np.uint16)
    while True:
        np.copyto(target, source)
        yield target


def take(path: Path) -> Iterator:
    """Gather random rows in memory: an upper bound of any shuffle."""
    features = np.load(path / "features.npy")
    rng = np.random.default_rng(0)
    while True:
        yield np.take(features, rng.integers(0, len(features), BATCH), axis=0, mode="clip")


def preadv(path: Path, threads: int) -> Iterator:
    """Read the blocks of a batch in random order without using them."""
    features = open_features(open_dataset(path))
    files = [os.open(features.shard_path(s), os.O_RDONLY) for s in range(features.dataset.rows // SHARD)]
    order = np.random.default_rng(0).permutation(len(files) * SHARD // BLOCK)
    buffers = np.zeros((BATCH // BLOCK, CHUNK), np.uint8)

    def read(row: int, block: int) -> None:
        file, inside = divmod(block, SHARD // BLOCK)
        if os.preadv(files[file], [buffers[row]], inside * CHUNK) != CHUNK:
            raise RuntimeError("a block was not read whole")

    with ThreadPoolExecutor(threads) as pool:
        while True:
            blocks, order = order[: len(buffers)], np.roll(order, -len(buffers))
            list(pool.map(read, range(len(buffers)), blocks.tolist()))
            yield buffers


def tensorstore(path: Path) -> Iterator:
    """Read the same blocks with TensorStore's futures."""
    array = open_features(open_dataset(path)).array()
    order = np.random.default_rng(0).permutation(array.shape[0] // BLOCK)
    buffer = np.zeros((BATCH, WIDTH), BFLOAT16)
    target = ts.array(buffer)
    while True:
        blocks, order = order[: BATCH // BLOCK], np.roll(order, -(BATCH // BLOCK))
        reads = [
            target[i * BLOCK : (i + 1) * BLOCK].write(array[b * BLOCK : (b + 1) * BLOCK])
            for i, b in enumerate(blocks.tolist())
        ]
        for read in reads:
            read.result()
        yield buffer


class _Rows:
    """One element per row, from a memory map, as grain and PyTorch want it."""

    def __init__(self, path: Path) -> None:
        self.features = np.load(path / "features.npy", mmap_mode="r")
        self.ids = np.zeros((len(self.features), LENGTH), np.int16)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"images": np.array(self.features[row]), "ids": self.ids[row]}


def grain_rows(path: Path) -> Iterator:
    """Yield rows through grain, as in its documentation."""
    rows: Any = _Rows(path)
    # Nothing ahead, or the one batch that is counted would be there already; threads make this no faster.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    pipeline = grain.MapDataset.source(rows).seed(0).shuffle().repeat().batch(BATCH)
    return iter(pipeline.to_iter_dataset(options))


def torch_rows(path: Path, workers: int) -> Iterator:
    """Yield rows through a DataLoader, as in PyTorch's documentation."""
    from torch.utils.data import DataLoader

    rows: Any = _Rows(path)
    while True:
        yield from DataLoader(rows, BATCH, shuffle=True, num_workers=workers, drop_last=True)


# Line of the table -> its batches, the number of measured batches, and whether it is measured cold as well.
CASES: dict[str, tuple[Callable[[Path], Iterator], int, bool]] = {
    "memory copy": (copy, BATCHES, False),
    "preadv, 1 thread": (lambda path: preadv(path, 1), BATCHES, True),
    "preadv, 8 threads": (lambda path: preadv(path, 8), BATCHES, True),
    "TensorStore, whole blocks": (tensorstore, BATCHES, True),
    "numpy.take in memory": (take, BATCHES, False),
    "ours, in memory": (ours_in_memory, BATCHES, False),
    "ours, windows of 2 blocks": (lambda path: ours_windows(path, 2), BATCHES, True),
    "ours, windows of 4 blocks": (lambda path: ours_windows(path, 4), BATCHES, True),
    "ours, windows of 8 blocks": (lambda path: ours_windows(path, 8), BATCHES, True),
    "torch DataLoader, .npy, 0 workers": (lambda path: torch_rows(path, 0), 2, False),
    "torch DataLoader, .npy, 2 workers": (lambda path: torch_rows(path, 2), 8, False),
    "grain row by row, .npy": (grain_rows, 1, False),
}
BYTES_ONLY = 4  # the first lines


def run_case(case: dict[str, Any]) -> Result:
    """Measure one line of a table in this process."""
    path = Path(case["path"])
    return grow(path) if "line" not in case else speed(path, case["line"], case["cold"])


def speed(path: Path, line: str, cold: bool) -> Result:
    """Measure rows per second and processor microseconds per row, including threads and workers."""
    make, count, _ = CASES[line]
    rates, costs = [], []
    for _ in range(REPEATS):
        if cold:
            forget(path)
        batches = make(path)
        for _ in range(count):
            next(batches)
        start, before = time.perf_counter(), cpu_seconds()
        for _ in range(count):
            next(batches)
        rates.append(count * BATCH / (time.perf_counter() - start))
        costs.append(1e6 * (cpu_seconds() - before) / (count * BATCH))
        del batches
    return {"rates": sorted(rates), "cost": statistics.median(costs)}


def cpu_seconds() -> float:
    """Return the processor seconds of this process and of its workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def grow(path: Path) -> Result:
    """Measure the time to open a dataset and to read its first batches."""
    start = time.perf_counter()
    stream = open_ours(path, MEMORY_GIB)
    opened = time.perf_counter()
    batches = stream.iterate(0)
    next(batches)
    first = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    after = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    rate = BATCHES * BATCH / (time.perf_counter() - after)
    how = "memory" if "in memory" in stream.description else "windows"
    return {
        "open": opened - start,
        "first": first - opened,
        "rate": rate,
        "memory": peak_memory(),
        "how": how,
    }


def speed_table(path: Path) -> dict[str, Result]:
    print(f"| batches of {BATCH:,} | rows/s, median of {REPEATS} | lowest - highest | CPU µs/row |")
    print("|---|---|---|---|")
    results = {}
    for number, (line, (_, _, disk)) in enumerate(CASES.items()):
        if number == BYTES_ONLY:
            print("|  |  |  |  |")
        for cold in (False, True) if disk else (False,):
            name = f"{line}, {'cold' if cold else 'warm'}" if disk else line
            result = run_alone("benchmarks.stream", {"path": str(path), "line": line, "cold": cold})
            if "failed" in result:
                print(f"| {name} | {result['failed']} | | |", flush=True)
                continue
            results[name] = result
            rates = result["rates"]
            middle, spread = statistics.median(rates), f"{rates[0]:,.0f} - {rates[-1]:,.0f}"
            print(f"| {name} | {middle:,.0f} | {spread} | {result['cost']:.2f} |", flush=True)
    return results


def growth_table(folder: Path, sizes: list[int]) -> dict[int, Result]:
    print("\n| rows | width | read by | opened, s | first batch, s | rows/s | memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            path, linked = Path(temporary) / "d", rows >= LINKED
            width = NARROW if linked else WIDTH
            (make_linked_store if linked else make_store)(path, rows, width)
            runs = [run_alone("benchmarks.stream", {"path": str(path)}) for _ in range(REPEATS)]
        if failed := [run["failed"] for run in runs if "failed" in run]:
            print(f"| {rows:,} | {width} | {failed[0]} | | | | |", flush=True)
            continue
        found = {
            name: statistics.median(run[name] for run in runs) for name in ("open", "first", "rate", "memory")
        }
        results[rows] = found
        print(
            f"| {rows:,} | {width} | {runs[0]['how']} | {found['open']:.3f} | {found['first']:.2f} "
            f"| {found['rate']:,.0f} | {found['memory'] / 2**20:,.0f} |",
            flush=True,
        )
    return results


def plot(speeds: dict[str, Result], growth: dict[int, Result], out: Path) -> None:
    """Plot the rows per second of every line, and seconds over the rows of the dataset."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4.2), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(reversed(speeds))
    middles = [statistics.median(speeds[name]["rates"]) for name in names]
    colours = ["tab:blue" if name.startswith("ours") else "grey" for name in names]
    bars.barh(names, middles, color=colours)
    bars.set_xscale("log")
    bars.set(xlabel="rows a second")
    bars.tick_params("y", labelsize="small")
    for name, label in (("open", "opened"), ("first", "first batch")):
        lines.plot(list(growth), [found[name] for found in growth.values()], "o-", label=label)
    lines.set_xscale("log")
    lines.set_yscale("log")
    lines.set(xlabel="rows of the dataset", ylabel="seconds")
    lines.legend(fontsize="small")
    for axes in (bars, lines):
        axes.grid(alpha=0.3)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--growth", type=int, nargs="*", default=[10**n for n in range(4, 9)])
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(json.loads(args.case))))
        return
    if args.rows <= 64 * 8 * BLOCK:
        sys.exit(f"--rows {args.rows} fit the windows; give more than {64 * 8 * BLOCK}")
    print(describe("jax", "numpy", "tensorstore", "grain", "array-record", "torch"))
    print(f"{args.rows:,} rows of {WIDTH} bfloat16 and {LENGTH} tokens\n", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "d"
        make_store(path, args.rows, WIDTH)
        np.save(path / "features.npy", open_features(open_dataset(path)).read_all().view(np.int16))
        speeds = speed_table(path)
    growth = growth_table(args.folder, args.growth)
    if speeds and growth:
        plot(speeds, growth, Path(__file__).with_name("stream.svg"))


if __name__ == "__main__":
    main()
