"""Measure the input stream from a bucket: a server on localhost that answers late.

    python -m benchmarks.remote_stream [--rows 2000000] [--seconds 20]

768-wide bfloat16 features with one caption of 16 tokens a row, batches of 32 768, windows of 8 blocks. The step of a
training is a sleep, as long as it would be at 25,000 or 70,000 rows/s; without one the stream is as fast as it can. The
shards are hard links to one file. Client and server share the machine, so https costs its processor time twice. Takes
five minutes and 200 MB of disk under --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bucket_server import make_certificate, running_server
from benchmarks.machine import describe, run_alone
from benchmarks.stream_store import make_linked_store
from lit_fast.config import StreamConfig
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from lit_fast.data.tokens import open_tokens
from lit_fast.train.input_pipeline.stream import open_stream

WIDTH, BATCH = 768, 32_768
LATENCIES = (0.04, 0.15)  # seconds before each answer
RATES = (25_000, 70_000, 0)  # rows per second of the training; 0: no training


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """Read batches for some seconds and sleep after each, in this process."""
    rate, seconds = case["rate"], case["seconds"]
    start = time.perf_counter()
    dataset = open_dataset("gs://bucket/d")
    config = StreamConfig(global_batch=BATCH, memory_gib=0.0)
    batches = open_stream(open_features(dataset), open_tokens(dataset), config, 0).iterate(0)
    opened = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    for _ in range(4):
        time.sleep(BATCH / rate if rate else 0)
        next(batches)
    begin, cpu = time.perf_counter(), time.process_time()
    waited, longest, count = 0.0, 0.0, 0
    while time.perf_counter() - begin < seconds:
        time.sleep(BATCH / rate if rate else 0)
        asked = time.perf_counter()
        next(batches)
        wait = time.perf_counter() - asked
        waited, longest, count = waited + wait, max(longest, wait), count + 1
    total = time.perf_counter() - begin
    return {
        "rate": count * BATCH / total,
        "waited": waited / total,
        "longest": longest,
        "cpu": 1e6 * (time.process_time() - cpu) / (count * BATCH),
        "first": first - opened,
        "opened": opened - start,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case")
    parser.add_argument("--folder", type=Path, default=Path(), help="of the dataset")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(json.loads(args.case))))
        return
    print(describe("tensorstore", "numpy"))
    print(f"{args.rows:,} rows of {WIDTH} bfloat16, batches of {BATCH:,}\n")
    print("| server | asked, rows/s | got | waited | longest | CPU µs/row | first batch, s | load |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bucket = Path(folder) / "bucket"
        make_linked_store(bucket / "d", args.rows, WIDTH)
        certificate = make_certificate(Path(folder) / "server.pem")
        for latency in LATENCIES:
            for scheme in ("http", "https"):
                with running_server(bucket, latency, certificate if scheme == "https" else None) as server:
                    environment = server | {"LIT_FAST_CACHE": str(Path(folder) / "cache")}
                    for rate in RATES:
                        case = {"rate": rate, "seconds": args.seconds}
                        found = run_alone("benchmarks.remote_stream", case, environment=environment)
                        print(
                            f"| {1000 * latency:.0f} ms, {scheme} | {f'{rate:,}' if rate else 'most'} | {row(found)} |",
                            flush=True,
                        )


def row(found: dict[str, Any]) -> str:
    """Return the cells of a result."""
    if "failed" in found:
        return f"{found['failed']} | | | | |"
    return (
        f"{found['rate']:,.0f} | {found['waited']:.1%} | {found['longest']:.2f} s | {found['cpu']:.2f} "
        f"| {found['first']:.1f} | {found['load']:.0f}"
    )


if __name__ == "__main__":
    main()
