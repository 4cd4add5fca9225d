"""Several processes joined by jax.distributed on this machine train as one does."""

import signal
import socket
import time

import jax
import numpy as np
import pytest

from lit_fast.data.dataset import BLOCK
from lit_fast.runs.run import open_run
from lit_fast.storage.text_files import read_json
from tests.buckets import bucket  # noqa: F401
from tests.e2e.machines import Machine, put, wait_until_exists
from tests.e2e.trainings import finish, lines_without_times, metrics, start
from tests.synthetic import make_dataset

CONFIG = """
steps = 30
[text]
variant = "mu"
dropout = 0.1
dtype = "float32"
[stream]
global_batch = 64
[optimizer]
name = "adam"
warmup_steps = 5
[evaluate]
every_steps = 15
retrieval = ["e"]
[checkpoint]
every_steps = 1000
[log]
every_steps = 5
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    make_dataset(path / "d", 300, captions=2)
    make_dataset(path / "e", 40, captions=1)
    (path / "config.toml").write_text(CONFIG)
    finish(start(path, "one"))
    return path


def cluster(count):
    """Return the environment of each process of a job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [job | {"JAX_PROCESS_ID": str(i)} for i in range(count)]


def start_processes(path, workdir, count, *more):
    """Start the processes of one training."""
    return [start(path, workdir, *more, environment=environment) for environment in cluster(count)]


def assert_same_course(path, a, b):
    one, two = metrics(path / a), metrics(path / b)
    assert list(one) == list(two)
    # The order of sums differs, so each step differs by rounding, 1e-7, which Adam accumulates.
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-4)
    name = "e/image_retrieval_recall@5"
    assert metrics(path / a, name).keys() == metrics(path / b, name).keys() == {15, 30}


def test_several_processes_train_as_one_does(case):
    first, *others = finish(*start_processes(case, "of4", 4))
    assert "trained 30 steps" in first
    assert not any("step" in text for text in others)  # only the first process prints
    assert_same_course(case, "one", "of4")


def test_several_processes_share_the_windows_of_a_large_dataset(case):
    make_dataset(case / "large", 4 * BLOCK)
    options = [
        "--dataset=large",
        "--stream.memory_gib=0",
        "--stream.shuffle_streams=2",
        "--stream.shuffle_window_blocks=1",
    ]
    options += ["--text.dropout=0", "--text.mask_padding=true"]
    (log,) = finish(start(case, "windows", *options))
    assert "shuffled in windows of 2,048 rows" in log
    first, _ = finish(*start_processes(case, "windows-of2", 2, *options, "--text.pack=4"))
    assert " captions of 8.0 tokens on average share a row of " in first  # packing computes the same loss
    assert_same_course(case, "windows", "windows-of2")


def test_processes_search_the_neighbours_together(case):
    options = [
        "--steps=10",
        "--stream.neighbours=4",
        "--loss.near_duplicates=mask",
        "--evaluate.every_steps=0",
    ]
    first, other = finish(*start_processes(case, "neighbours-of2", 2, *options))
    assert "nearest neighbours 300/300 images" in first
    assert "nearest neighbours" not in other
    first, _ = finish(
        *start_processes(case, "neighbours-of2", 2, *options)
    )  # they are read, and have the same digest
    assert "nearest neighbours" not in first
    assert "is complete" in first


def test_signal_to_one_process_stops_all_after_the_same_step(case):
    processes = start_processes(case, "stopped", 2)
    path = case / "stopped" / "metrics.jsonl"
    while not (path.exists() and '"step": 5' in path.read_text()):
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    out = finish(*processes, status=143)[0]
    (step,) = [int(p.name) for p in (case / "stopped/checkpoints").iterdir()]
    assert f"stopped after step {step}" in out
    assert step < 30
    finish(start(case, "stopped"))  # resumes in one process with the same batches
    assert_same_course(case, "one", "stopped")


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_hosts_killed_with_their_disks_end_with_the_same_bits_on_others(case, bucket, tmp_path):  # noqa: F811
    """Each process has a disk of its own; the first alone writes the run in the bucket."""
    finish(*start_processes(case, "undisturbed", 2))
    for name in ("d", "e"):
        put(case / name, f"{bucket}/{name}")
    words = ["train", case / "config.toml", "--workdir", f"{bucket}/r", "--dataset", f"{bucket}/d"]
    words += [f"--evaluate.retrieval={bucket}/e", "--checkpoint.every_steps=5"]

    def start_machines(generation):
        machines = [Machine(tmp_path, f"{generation} {rank}") for rank in range(2)]
        environments = cluster(2)
        return machines, [m.start(*words, environment=e) for m, e in zip(machines, environments, strict=True)]

    machines, processes = start_machines("first")
    wait_until_exists(f"{bucket}/r/checkpoints/5.json", *processes)
    for machine, process in zip(machines, processes, strict=True):
        machine.destroy(process)
    machines, processes = start_machines("second")
    first, second = finish(*processes)
    assert "resuming after step" in first
    assert "step" not in second
    one, two = open_run(case / "undisturbed"), open_run(f"{bucket}/r")
    assert one.step == two.step == 30
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert lines_without_times(case / "undisturbed") == lines_without_times(f"{bucket}/r")
    assert read_json(f"{bucket}/r/receipt.json")["hardware"]["processes"] == 2
    written = {path.name for path in (machines[1].disk / "cache" / "runs").rglob("*")}
    assert not written & {"checkpoints", "receipt.json", "report.html"}
