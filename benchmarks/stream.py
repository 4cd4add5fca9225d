"""Rows per second of the input stream alone: in memory, through windows warm and cold, beside two rivals.

    python -m benchmarks.stream [--rows 400000]

768-wide bfloat16 features with one caption of 16 tokens a row, batches of 32 768. Rivals on the same
features: grain with one element per row (memory-mapped), which is what its documentation shows, and a bare
`numpy.take` of random rows, which is the bound of any shuffle in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grain
import ml_dtypes
import numpy as np

from benchmarks.machine import describe
from lit_fast.config import StreamConfig
from lit_fast.dataset import DatasetWriter, Row, open_dataset
from lit_fast.features import Features, Manifest, open_features
from lit_fast.files import write_json
from lit_fast.records import RecordWriter
from lit_fast.tokens import encode_record, open_tokens
from train.stream import open_stream

WIDTH, LENGTH, BATCH, VOCAB = 768, 16, 32_768, 32_000


def make_store(path: Path, rows: int) -> None:
    """A dataset of random features and tokens; no picture is needed to read it."""
    rng = np.random.default_rng(0)
    writer = DatasetWriter(path)
    for r in range(rows):
        writer.add(Row(f"{r:09d}", 0, 0, 0, ("caption",)))
    dataset = writer.finish(seed=0, sources=[])
    tower = {"name": "random", "source": "none", "identity": "random", "width": WIDTH}
    features = Features(dataset, "random", tower)
    write_json(features.path / "tower.json", tower)
    array = features.array(create=True)
    for shard in range(dataset.shards):
        lo, hi = shard * 65_536, min((shard + 1) * 65_536, rows)
        values = rng.standard_normal((hi - lo, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
        array[lo:hi].write(values).result()
        features.write_manifest(Manifest(shard, lo, hi - lo, dataset.shard_keys[shard], "random", {}))
    records = RecordWriter(path / "tokens" / "random")
    for lo in range(0, rows, 1024):
        ids = rng.integers(2, VOCAB, (min(1024, rows - lo), 1, LENGTH))
        records.write(encode_record(ids.tolist(), VOCAB))
    records.close()
    meta = {"identity": "random", "vocab_size": VOCAB, "max_length": LENGTH, "pad_id": 1, "eos_id": 1}
    write_json(path / "tokens/random/tokens.json", meta | {"shard_keys": list(dataset.shard_keys)})


def forget(path: Path) -> None:
    """Drop a tree's files from the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(batches: Iterator, steps: int) -> tuple[float, float]:
    """(rows per second, CPU microseconds per row) over `steps` batches after two for warming up."""
    for _ in range(2):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return steps * BATCH / wall, 1e6 * cpu / (steps * BATCH)


def our_stream(path: Path, memory_gib: float, window_blocks: int = 8) -> Iterator:
    dataset = open_dataset(path)
    config = StreamConfig(global_batch=BATCH, memory_gib=memory_gib, window_blocks=window_blocks)
    stream = open_stream(open_features(dataset), open_tokens(dataset), config, 0)
    return stream.iterate(0)


class _Rows(grain.sources.RandomAccessDataSource):
    """One element per row, from a memory map."""

    def __init__(self, features: np.ndarray, ids: np.ndarray) -> None:
        self.features, self.ids = features, ids

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {"images": self.features[row], "ids": self.ids[row]}


def row_by_row(memory: Path, rows: int) -> Iterator:
    features = np.memmap(memory, np.uint16, "r", shape=(rows, WIDTH))
    source = _Rows(features, np.zeros((rows, LENGTH), np.uint16))
    return iter(grain.MapDataset.source(source).seed(0).shuffle().repeat().batch(BATCH).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    ))  # fmt: skip


def bare_take(memory: Path, rows: int) -> Iterator:
    features = np.fromfile(memory, np.uint16).reshape(rows, WIDTH)
    rng = np.random.default_rng(0)
    while True:
        yield np.take(features, rng.integers(0, rows, BATCH), axis=0, mode="clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, flat = Path(folder) / "d", Path(folder) / "features.bin"
        make_store(path, args.rows)
        open_features(open_dataset(path)).read_all().view(np.uint16).tofile(flat)
        # Four blocks a window: the windows of the 64 streams are then smaller than the dataset.
        cases = [
            ("ours, in memory", lambda: our_stream(path, 100.0), 24, False),
            ("ours, windows, warm", lambda: our_stream(path, 0.0, 4), 24, False),
            ("ours, windows, cold", lambda: our_stream(path, 0.0, 4), 9, True),
            ("numpy.take in memory", lambda: bare_take(flat, args.rows), 24, False),
            ("grain row by row, memory map", lambda: row_by_row(flat, args.rows), 1, False),
        ]
        print(describe("jax", "numpy", "tensorstore", "grain", "array-record"))
        print(f"{args.rows:,} rows of {WIDTH} bfloat16 and {LENGTH} tokens, batch {BATCH:,}\n")
        print(f"| input | rows/s, median of {args.repeats} | lowest - highest | CPU µs/row |")
        print("|---|---|---|---|")
        for name, make, steps, cold in cases:
            results = []
            for _ in range(args.repeats):
                if cold:
                    forget(path)
                results.append(measure(make(), steps))
            rates = sorted(r for r, _ in results)
            cpu = statistics.median(c for _, c in results)
            print(
                f"| {name} | {statistics.median(rates):,.0f} | {rates[0]:,.0f} - {rates[-1]:,.0f} | {cpu:.2f} |"
            )


if __name__ == "__main__":
    main()
