"""Several processes embed disjoint shards of a dataset independently of each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_fast.data.features import open_features
from lit_fast.embed.extract import embed_dataset
from tests.embed.test_extract import SMALL_SHARDS, many, progress_of, tree


def environment(number: int, count: int, port: int) -> dict[str, str]:
    """Of one process of a cluster on this machine; one device each, where the other tests have four."""
    cluster = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }
    return os.environ | cluster | {"XLA_FLAGS": ""}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(dataset: Path, tower: Path, number: int, count: int) -> subprocess.Popen[bytes]:
    arguments = ["embed", str(dataset), "--tower", str(tower), "--name", "shared", "--batch-size", "2"]
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_SHARDS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(number, count, free_port()),
    )


def stop_at_work(processes: list[subprocess.Popen[bytes]], partial: Path) -> None:
    """Stop each process once the journal of the shard with its number has 200 rows."""
    running = dict(enumerate(processes))
    while running:
        for number, process in list(running.items()):
            assert process.poll() is None
            journal = partial / f"{number:05d}.journal"
            if journal.exists() and journal.stat().st_size >= 200 * 64:
                process.send_signal(signal.SIGSTOP)
                del running[number]
        time.sleep(0.001)


@pytest.mark.parametrize("count", [2, 4])
def test_embed_by_one_process_finishes_the_work_of_a_killed_one(
    count: int, tmp_path: Path, tiny_vit: Path, small_shards: None
) -> None:
    """The same bytes, though one process has one device and the single one has four."""
    dataset = many(tmp_path)
    embed_dataset(dataset.path, str(tiny_vit), name="alone", batch_size=2)
    shared = Path(dataset.path) / "features" / "shared"
    victim, *others = [start(Path(dataset.path), tiny_vit, number, count) for number in range(count)]
    try:
        # All that have a shard are at work when the victim is killed; the fourth process has none.
        stop_at_work([victim, *others][: dataset.shards], shared / "partial")
    finally:
        victim.send_signal(signal.SIGKILL)
        for process in others:
            process.send_signal(signal.SIGCONT)
    victim.communicate()
    errors = b""
    for number, process in enumerate(others, 1):
        out, err = process.communicate(timeout=100)
        errors += err
        assert process.returncode == 0, err  # nobody waits for the dead
        assert b"embedded " in out or number == 3
    assert open_features(dataset, "shared").finished() == [1, 2][: count - 1]
    assert (shared / "partial" / "00000.journal").stat().st_size >= 200 * 64
    # by the last one to finish
    assert b"no process is embedding them; embed them with: lit-fast embed" in errors
    embed_dataset(dataset.path, str(tiny_vit), name="shared", batch_size=2)
    assert tree(shared) == tree(Path(dataset.path) / "features" / "alone")


def test_embed_does_not_mention_shares_that_a_process_embeds(
    tmp_path: Path, tiny_vit: Path, small_shards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = many(tmp_path)
    working = start(dataset.path, tiny_vit, 0, 2)
    while progress_of(Path(dataset.path) / "features" / "shared") < 100:
        assert working.poll() is None
        time.sleep(0.01)
    working.send_signal(signal.SIGSTOP)  # it holds its journal
    try:
        embed_dataset(dataset.path, str(tiny_vit), name="shared", batch_size=2, share=(1, 2))
        assert "no process is embedding" not in capsys.readouterr().err
    finally:
        working.send_signal(signal.SIGCONT)
        out, err = working.communicate()
    assert working.returncode == 0, err
    assert b"into" in out
