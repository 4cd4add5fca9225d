"""Several processes joined by jax.distributed on this machine train as one does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

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
    finish(case_processes(path, "one", 1))
    return path


def case_processes(path, workdir, count, *more):
    """Start the processes of one training."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "lit_fast",
        "train",
        "config.toml",
        "--workdir",
        workdir,
        "--dataset",
        "d",
    ]
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [*command, *more],
            cwd=path,
            env=plain | (cluster | {"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes, status=0):
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [status] * len(processes), "\n".join(outputs)
    return outputs


def metrics(path, workdir, name):
    lines = [json.loads(line) for line in (path / workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same_course(path, a, b):
    one, two = metrics(path, a, "loss"), metrics(path, b, "loss")
    assert list(one) == list(two)
    # Sums in another order: each step differs by rounding, 1e-7, and Adam carries it on.
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-4)
    name = "e/image_retrieval_recall@5"
    assert metrics(path, a, name).keys() == metrics(path, b, name).keys() == {15, 30}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one_does(case, count):
    first, *others = finish(case_processes(case, f"of{count}", count))
    assert "trained 30 steps" in first
    assert not any("step" in text for text in others)  # one tells
    assert_same_course(case, "one", f"of{count}")


def test_a_signal_to_one_process_stops_all_after_the_same_step(case):
    processes = case_processes(case, "stopped", 2)
    path = case / "stopped" / "metrics.jsonl"
    while not (path.exists() and '"step": 5' in path.read_text()):
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    out = finish(processes, 143)[0]
    (step,) = [int(p.name) for p in (case / "stopped/checkpoints").iterdir()]
    assert f"stopped after step {step}" in out
    assert step < 30
    finish(case_processes(case, "stopped", 1))  # on in one process: the batches are the same
    assert_same_course(case, "one", "stopped")
