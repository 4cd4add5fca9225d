"""A run that is killed anywhere and started again ends with the same bits as one that was not."""

import random
import signal
import time

import jax
import numpy as np
import pytest

from lit_fast.runs.run import open_run
from tests.e2e.trainings import finish, metrics, start
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
    # Step 1 and every fifth: nothing twice, nothing missing.
    assert list(metrics(case / a)) == [1, *range(5, steps + 1, 5)]


def kill_after(process, checkpoint):
    """Kill it some time after it has saved."""
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()


def test_killed_at_random_moments(case):
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
                break  # it is on its way: let it go on for a random moment
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


def test_sigterm_saves_and_goes_on(case):
    process = start(case, "stopped", "--checkpoint.every_steps", "1000")
    log = case / "stopped" / "metrics.jsonl"
    while not (log.exists() and '"step": 20' in log.read_text()):  # in the midst of the steps
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    if process.returncode != 0:  # a quick machine may have been done
        assert process.returncode == 143, said
        assert "rerun the same command to continue" in said
        steps = [int(p.name) for p in (case / "stopped/checkpoints").iterdir()]
        assert len(steps) == 1
        assert f"after step {steps[0]}" in said
    finish(start(case, "stopped"))
    assert_same_bits(case, "one", "stopped")


def test_whatever_is_drawn_or_kept_beside_the_weights_goes_on(case):
    """Random negatives, corrupted texts, an image head, an average, captions side by side with dropout."""
    options = ["--loss.negatives=random", "--loss.negatives_per_positive=2", "--stream.corrupt_texts=0.3"]
    options += ["--steps=40", "--loss.image_head=true", "--optimizer.average_decay=0.9"]
    options += ["--text.mask_padding=true", "--text.pack=2", "--text.dropout=0.1"]
    finish(start(case, "all-whole", *options, devices=2))
    kill_after(start(case, "all-killed", *options, devices=2), case / "all-killed/checkpoints/20")
    assert "resuming after step" in finish(start(case, "all-killed", *options, devices=2))[0]
    for average in (False, True):
        assert_same_bits(case, "all-whole", "all-killed", 40, average)


def test_devices_do_not_change_the_data_and_hardly_the_loss(case):
    """On from two devices to four: the checkpoint and the stream fit any number of devices."""
    kill_after(start(case, "moved", devices=2), case / "moved/checkpoints/20")
    assert "resuming after step" in finish(start(case, "moved", devices=4))[0]
    one, moved = metrics(case / "one"), metrics(case / "moved")
    assert one.keys() == moved.keys()
    # Lion moves by the sign of a mean: where that is within rounding of zero a weight goes the other way by
    # 2e-3, which the loss (about 10 -> 5) hardly feels.
    np.testing.assert_allclose(list(one.values()), list(moved.values()), rtol=2e-3)
    assert one[1] == pytest.approx(moved[1], rel=1e-6)


def test_a_run_that_goes_non_finite_keeps_the_last_good_checkpoint(case):
    (said,) = finish(start(case, "bad", "--optimizer.learning_rate", "1e30"), status=2)
    line = said.strip().splitlines()[-1]
    assert line.startswith("lit-fast: error: loss or gradient became non-finite at step ")
    assert not list((case / "bad/checkpoints").glob("[0-9]*"))
