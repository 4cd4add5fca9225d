"""A run with a trained image tower: killed and resumed, and on several processes."""

import signal
import time

import jax
import numpy as np
import pytest

from lit_fast import api
from lit_fast.runs.run import open_run
from tests.e2e.test_processes import cluster
from tests.e2e.trainings import metrics, start
from tests.helpers import samples, tiny_vit_arrays, write_tar
from tests.trained import command

CONFIG = """
steps = 15
tower = "tiny"
[text]
variant = "mu"
dropout = 0.1
dtype = "float32"
[image]
train = "unlocked"
crop = true
flip = true
[stream]
global_batch = 16
[optimizer]
name = "adam"
warmup_steps = 5
average_decay = 0.5
[checkpoint]
every_steps = 5
[log]
every_steps = 1
"""
OPTIONS = {
    "unlocked": ("--evaluate.every_steps=5", "--evaluate.retrieval=d"),
    "scratch": ("--image.train=scratch", "--image.arch=mu/8", "--image.resolution=16"),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The dataset d with features tiny, the configuration, and a whole run in each mode on four devices."""
    path = tmp_path_factory.mktemp("unlocked")
    np.savez(path / "tiny.npz", **tiny_vit_arrays())
    (path / "config.toml").write_text(CONFIG)
    api.index(write_tar(path / "pairs.tar", samples(40)), out=path / "d")
    api.embed(path / "d", tower=path / "tiny.npz")
    api.tokenize(path / "d", train_vocab=284, name="words", max_length=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for mode in OPTIONS:
            train(mode, mode)
        yield path


def train(workdir, mode):
    """Train in this process."""
    command("train", "config.toml", "--workdir", workdir, "--dataset", "d", *OPTIONS[mode])


def kill_in_the_middle(path, workdir, step, *processes):
    """Kill the processes of a training after its checkpoint of a step."""
    while not (path / workdir / f"checkpoints/{step}").exists():
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.02)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * len(processes)


@pytest.mark.parametrize("mode", OPTIONS)
def test_killed_run_ends_with_the_same_bits(case, capsys, mode):
    workdir = f"{mode}-killed"
    kill_in_the_middle(case, workdir, 5, start(case, workdir, *OPTIONS[mode], devices=4))
    train(workdir, mode)
    assert "resuming after step" in capsys.readouterr().err
    for average in (False, True):
        one, two = (open_run(case / w, average=average) for w in (mode, workdir))
        assert one.step == two.step == 15
        assert "embedding" in one.params["img"]
        jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    for name in ("loss", "d/image_retrieval_recall@5"):
        assert metrics(case / mode, name) == metrics(case / workdir, name)


def test_processes_train_and_evaluate_as_one_and_another_number_resumes(case, capsys):
    """Two processes until they are killed, then one."""
    processes = (start(case, "of2", *OPTIONS["unlocked"], environment=e) for e in cluster(2))
    kill_in_the_middle(case, "of2", 10, *processes)
    train("of2", "unlocked")
    assert "resuming after step" in capsys.readouterr().err
    one, two = metrics(case / "unlocked"), metrics(case / "of2")
    assert list(one) == list(two) == list(range(1, 16))
    # The order of sums differs, so each step differs by rounding, 1e-7, which Adam accumulates.
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    name = "d/image_retrieval_recall@5"
    one, two = metrics(case / "unlocked", name), metrics(case / "of2", name)
    assert list(one) == list(two) == [5, 10, 15]
    # One of 40 images may change its rank by rounding.
    np.testing.assert_allclose(list(two.values()), list(one.values()), atol=1 / 40)
