"""A run that is killed at any moment and resumed ends with the same bits as one that was not."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from lit_fast.runs.run import open_run
from lit_fast.storage.files import exists
from tests.buckets import bucket  # noqa: F401
from tests.e2e.machines import Machine, kill_at_random, put
from tests.e2e.trainings import finish, lines_without_times, metrics, start
from tests.synthetic import make_dataset

CONFIG = """
steps = 120
[text]
variant = "mu"
dropout = 0.1
dtype = "float32"
[loss]
center = true
[stream]
global_batch = 64
captions_per_image = 2
[optimizer]
learning_rate = 1e-3
warmup_steps = 10
[evaluate]
every_steps = 40
[checkpoint]
every_steps = 20
[log]
every_steps = 5
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    make_dataset(path / "d", 500, captions=3, invalid=(17,))
    (path / "config.toml").write_text(CONFIG)
    finish(start(path, "one"))
    return path


def assert_same_bits(case, a, b, steps=120, average=False):
    one, two = (open_run(case / w, average=average) for w in (a, b))
    assert one.step == two.step == steps
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert metrics(case / a) == metrics(case / b)
    # Step 1 and every fifth, each once.
    assert list(metrics(case / a)) == [1, *range(5, steps + 1, 5)]


def kill_after(process, checkpoint):
    """Kill a process after it has saved a checkpoint."""
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()


def test_run_killed_at_random_moments_ends_with_the_same_bits(case):
    finish(start(case, "whole", devices=4))
    random_ = random.Random(time.time_ns())
    kills = 0
    for _ in range(12):
        process = start(case, "killed", devices=4)
        log = case / "killed" / "metrics.jsonl"
        before = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > before + 1500 * random_.random():
                break  # it is training: kill it after a random delay
            time.sleep(0.01)
        time.sleep(1.5 * random_.random())
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        kills += 1
        if kills == 3:
            break
    assert kills >= 1
    finish(start(case, "killed", devices=4))
    assert_same_bits(case, "whole", "killed")


def test_run_killed_with_its_machine_ends_with_the_same_bits_on_another(case, bucket, tmp_path):  # noqa: F811
    """All that is left of a machine is what it has written to the bucket; LIT_FAST_KILLS of them are killed."""
    put(case / "d", f"{bucket}/d")
    run, began = f"{bucket}/r", time.monotonic()

    def start_machine(number):
        machine = Machine(tmp_path, f"machine {number}")
        return machine, machine.start(
            "train", case / "config.toml", "--workdir", run, "--dataset", f"{bucket}/d"
        )

    machine, process = start_machine(0)
    kill_at_random(machine, process, f"{run}/checkpoints/20.json", 1.0)
    seconds = time.monotonic() - began
    for number in range(1, int(os.environ.get("LIT_FAST_KILLS", "1"))):
        machine, process = start_machine(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.2 * seconds * random.random())
        machine.destroy(process)
    _, process = start_machine("last")
    (log,) = finish(process)
    assert "resuming after step" in log or "is complete" in log
    one, two = open_run(case / "one"), open_run(run)
    assert one.step == two.step == 120
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert lines_without_times(case / "one") == lines_without_times(run)
    assert not exists(f"{run}/.lock")


def test_sigterm_saves_and_the_run_resumes(case):
    process = start(case, "stopped", "--checkpoint.every_steps", "1000")
    log = case / "stopped" / "metrics.jsonl"
    while not (log.exists() and '"step": 20' in log.read_text()):  # during the steps
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    log_text, _ = process.communicate(timeout=120)
    if process.returncode != 0:  # a fast machine may have finished
        assert process.returncode == 143, log_text
        assert "rerun the same command to continue" in log_text
        steps = [int(p.name) for p in (case / "stopped/checkpoints").iterdir()]
        assert len(steps) == 1
        assert f"after step {steps[0]}" in log_text
    finish(start(case, "stopped"))
    assert_same_bits(case, "one", "stopped")


def test_resume_restores_random_draws_and_averages(case):
    """Random negatives, corrupted texts, an image head, an average, packed captions with dropout."""
    options = ["--loss.negatives=random", "--loss.negatives_per_positive=2", "--stream.corrupt_texts=0.3"]
    options += ["--steps=40", "--loss.image_head=true", "--optimizer.average_decay=0.9"]
    options += ["--text.mask_padding=true", "--text.pack=2", "--text.dropout=0.1"]
    finish(start(case, "all-whole", *options, devices=2))
    kill_after(start(case, "all-killed", *options, devices=2), case / "all-killed/checkpoints/20")
    assert "resuming after step" in finish(start(case, "all-killed", *options, devices=2))[0]
    for average in (False, True):
        assert_same_bits(case, "all-whole", "all-killed", 40, average)


def test_resume_on_other_devices_keeps_the_data_order(case):
    """A run on two devices is resumed on four and compared with one on one device."""
    kill_after(start(case, "moved", devices=2), case / "moved/checkpoints/20")
    assert "resuming after step" in finish(start(case, "moved", devices=4))[0]
    one, moved = metrics(case / "one"), metrics(case / "moved")
    assert one.keys() == moved.keys()
    # Lion moves by the sign of a mean. Where that is within rounding of zero, a weight may differ by 2e-3, which
    # changes the loss (about 10 -> 5) little.
    np.testing.assert_allclose(list(one.values()), list(moved.values()), rtol=2e-3)
    assert one[1] == pytest.approx(moved[1], rel=1e-6)


def test_non_finite_step_saves_no_checkpoint(case):
    (log_text,) = finish(start(case, "bad", "--optimizer.learning_rate", "1e30"), status=2)
    line = log_text.strip().splitlines()[-1]
    assert line.startswith("lit-fast: error: loss, gradient or parameters became non-finite at step ")
    assert not list((case / "bad/checkpoints").glob("[0-9]*"))


def test_full_disk_ends_in_one_line_and_the_run_resumes(case):
    options = ["--steps=30", "--text.width=256", "--stream.global-batch=16"]
    process = start(case, "full", *options)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (600_000, 600_000))  # of each file
    (log_text,) = finish(process, status=2)
    line = log_text.strip().splitlines()[-1]
    assert line.startswith("lit-fast: error: ")
    assert "full/checkpoints" in line
    assert " cannot be written: File too large; fix the cause, then rerun" in line
    assert "Traceback" not in log_text
    finish(start(case, "full", *options))
    assert open_run(case / "full").step == 30
