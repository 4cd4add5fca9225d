"""Trainings in a bucket that must stop, or may not start: each says so in one line, and nothing is lost."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_fast.runs.remote_checkpoints import stored_steps
from lit_fast.storage import buckets
from lit_fast.storage.files import exists
from tests.e2e.machines import Machine, put, wait_until_exists
from tests.e2e.trainings import TINY, finish
from tests.gcs import FakeGcs, running_gcs
from tests.synthetic import make_dataset

RUN = "gs://bucket/r"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGcs]:
    """Buckets with a dataset."""
    monkeypatch.setattr(buckets, "_stores", {})
    with running_gcs() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        make_dataset(tmp_path / "d", 60)
        put(tmp_path / "d", "gs://bucket/d")
        (tmp_path / "config.toml").write_text(f"steps = 100000\n{TINY}every_steps = 20\n")
        yield server


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    return ["train", tmp_path / "config.toml", "--workdir", RUN, "--dataset", "gs://bucket/d"]


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_of_two_machines_one_trains_and_a_lost_lease_stops_the_other(
    server: FakeGcs, words: list[object], tmp_path: Path
) -> None:
    one, two = (Machine(tmp_path, name) for name in ("one", "two"))
    first = one.start(*words)
    wait_until_exists(f"{RUN}/checkpoints/20.json", first)
    (output,) = finish(two.start(*words), status=2)
    assert f"error: workdir {RUN} is being written by `lit-fast train` (process {first.pid} on " in last_line(
        output
    )

    stopped = threading.Event()

    def stop_first(method: str, path: str) -> int:
        # At a moment with this request alone under way: any other would be written after the process goes on.
        if method == "POST" and re.search(r"checkpoints(/|%2F)\d+\.json", path) and not stopped.is_set():
            first.send_signal(signal.SIGSTOP)
            stopped.set()
        return 0

    server.fault = stop_first
    assert stopped.wait(60), first.poll()
    second = two.start(*words)
    while not exists(f"{two.disk}/cache/runs"):  # it has taken the lease over
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.05)
    before = max(stored_steps(RUN))
    while max(stored_steps(RUN)) == before:
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.05)

    began = time.monotonic()
    second.send_signal(signal.SIGTERM)
    (output,) = finish(second, status=143)
    assert time.monotonic() - began < 25  # a machine that is preempted has 30 s
    step = max(stored_steps(RUN))
    assert f"stopped after step {step:,} and saved" in output
    assert not exists(f"{RUN}/.lock")

    server.requests.clear()
    objects = dict(server.objects)
    first.send_signal(signal.SIGCONT)
    (output,) = finish(first, status=1)
    assert f"others may write workdir {RUN}; rerun the same command once no other process does" in last_line(
        output
    )
    assert server.objects == objects
    assert "Traceback" not in output


def test_bucket_that_becomes_unwritable_stops_the_training_which_continues_there(
    server: FakeGcs, words: list[object], tmp_path: Path
) -> None:
    machine = Machine(tmp_path, "one")
    process = machine.start(*words)
    wait_until_exists(f"{RUN}/checkpoints/20.json", process)
    server.fault = lambda method, path: 403 if method != "GET" else 0
    began = time.monotonic()
    (output,) = finish(process, status=2)
    assert time.monotonic() - began < 25
    assert "Traceback" not in output
    line = last_line(output)
    assert line.startswith("lit-fast: error: gs://bucket/r/")
    assert " may not be used (" in line
    assert (
        f"fix the cause, then rerun the same command, here to continue from what is in {machine.disk}" in line
    )
    assert "stopped after" not in output
    (local,) = (machine.disk / "cache" / "runs").iterdir()
    saved = max(int(path.name) for path in (local / "checkpoints").iterdir())
    assert saved > max(stored_steps(RUN))

    server.fault = lambda method, path: 0
    process = machine.start(*words)
    while (step := max(stored_steps(RUN))) < saved:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    assert step == saved
    process.send_signal(signal.SIGTERM)
    (output,) = finish(process, status=143)
    assert f"{RUN} lacks checkpoints that {local} has; writing them" in output
    assert f"resuming after step {saved:,}" in output or step == saved


def test_run_in_a_bucket_that_does_not_exist_is_one_line(
    server: FakeGcs, words: list[object], tmp_path: Path
) -> None:
    server.absent_buckets = {"absent"}
    words[words.index(RUN)] = "gs://absent/r"
    (output,) = finish(Machine(tmp_path, "one").start(*words), status=2)
    assert last_line(output).startswith("lit-fast: error: gs://absent/r")
    assert len(output.splitlines()) <= 2
