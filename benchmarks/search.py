"""Seconds for an exhaustive search of a feature store: ours warm and cold, beside two that hold it all in memory.

    python -m benchmarks.search [--rows 10_000_000] [--queries 1]

768-wide bfloat16 features of random numbers, centred, the best 20 rows. Rivals on the same rows, converted to
float32, centred and normalized beforehand (not counted): numpy's matrix product with argpartition, and faiss's
IndexFlatIP if `pip install faiss-cpu` has been run. They need twice the store's bytes of memory, faiss three
times in the making; `--ours` leaves them out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.machine import describe
from benchmarks.stream_store import forget
from lit_fast.data.dataset import SHARD
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import Features, Manifest
from lit_fast.inference.search import search
from lit_fast.models.two_towers import centered
from lit_fast.storage.text_files import write_json

WIDTH, TOP = 768, 20


def make_store(path: Path, rows: int) -> Features:
    """A dataset of random features with a common direction, so that centring matters."""
    writer = DatasetWriter(path)
    for r in range(rows):
        writer.add(Row(f"{r:09d}", 0, 0, 0, ()))
    tower = {"name": "random", "source": "none", "identity": "random", "width": WIDTH}
    features = Features(writer.finish(seed=0, sources=[]), "random", tower)
    write_json(Path(features.path) / "tower.json", tower)
    array = features.array(create=True)
    rng = np.random.default_rng(0)
    for shard in range(features.dataset.shards):
        lo, hi = shard * SHARD, min((shard + 1) * SHARD, rows)
        values = (rng.standard_normal((hi - lo, WIDTH), np.float32) + 1).astype(ml_dtypes.bfloat16)
        array[lo:hi].write(values).result()
        features.write_manifest(
            Manifest(shard, lo, hi - lo, features.dataset.shard_keys[shard], "random", {})
        )
    return features


def in_memory(features: Features, mean: np.ndarray) -> np.ndarray:
    """All embeddings, float32, made shard by shard."""
    out = np.empty((features.dataset.rows, WIDTH), np.float32)
    array = features.array()
    for lo in range(0, len(out), SHARD):
        part = out[lo : lo + SHARD]
        part[:] = array[lo : lo + len(part)].read().result()
        part -= mean
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


def with_numpy(embeddings: np.ndarray, queries: np.ndarray) -> np.ndarray:
    scores = embeddings @ queries.T
    best = np.argpartition(-scores, TOP, axis=0)[:TOP]
    order = np.argsort(-np.take_along_axis(scores, best, axis=0), axis=0)
    return np.take_along_axis(best, order, axis=0).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="without the rivals")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((args.queries, WIDTH), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        features = make_store(Path(folder) / "d", args.rows)
        mean = features.mean(())

        def ours() -> np.ndarray:
            found = search(features, queries, TOP, lambda block: centered(block, mean))
            return np.array([[row for row, _ in rows] for rows in found])

        cases: dict[str, Callable[[], np.ndarray]] = {"ours, warm": ours, "ours, cold": ours}
        if not args.ours:
            embeddings = in_memory(features, mean)
            cases["numpy in memory"] = lambda: with_numpy(embeddings, queries)
            if find_spec("faiss"):
                import faiss

                index = faiss.IndexFlatIP(WIDTH)
                index.add(embeddings)
                cases["faiss IndexFlatIP in memory"] = lambda: index.search(queries, TOP)[1]
        print(describe("numpy", "tensorstore"))
        print(f"{args.rows:,} rows of {WIDTH} bfloat16, {args.queries} queries, the best {TOP}\n")
        print(
            f"| search | seconds, median of {args.repeats} | lowest - highest | rows/s |\n|---|---|---|---|"
        )
        want = ours()
        for name, run in cases.items():
            seconds: list[float] = []
            for _ in range(args.repeats):
                if name == "ours, cold":
                    forget(Path(features.path))
                began = time.perf_counter()
                found = run()
                seconds.append(time.perf_counter() - began)
            median = statistics.median(seconds)
            same = "" if np.array_equal(found, want) else " (other rows)"
            print(
                f"| {name}{same} | {median:.2f} | {min(seconds):.2f} - {max(seconds):.2f} | {args.rows / median:,.0f} |"
            )


if __name__ == "__main__":
    main()
