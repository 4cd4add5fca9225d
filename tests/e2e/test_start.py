"""Runs that start from a pretrained text tower, which is loaded once and never exchanged."""

import json
import shutil

import jax
import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.models.sizes import VARIANTS
from lit_fast.models.text_tower import TextTower
from lit_fast.runs.run import open_run
from lit_fast.storage.files import sha256
from tests.e2e.trainings import TINY
from tests.synthetic import make_dataset
from tests.weights.test_text_towers import apart, drawn, nested

CONFIG = f"steps = 3{TINY}every_steps = 1\nkeep = 3\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("start")
    make_dataset(path / "d", 40)
    (path / "c.toml").write_text(CONFIG)
    return path


def write_weights(path, seed=0):
    vocabulary = json.loads((path.parent / "d/tokens/words/tokens.json").read_text())["vocab_size"]
    arrays = drawn(TextTower(VARIANTS["mu"], vocabulary, 10, 16), seed)
    file = {f"txt/{n}": a for n, a in apart(arrays).items()}
    np.savez(path, **file, t=np.array([2.5], np.float32), b=np.array([-7.0], np.float32))
    arrays["pos_embedding"] = arrays["pos_embedding"][:, :8]
    return arrays


def train(directory, run, weights, *more):
    command = ["train", str(directory / "c.toml"), "--workdir", str(run), "--dataset", str(directory / "d")]
    return main([*command, "--text.init", f"{weights}:txt", *more])


def test_pretrained_text_tower_is_loaded_once(directory, capsys):
    weights, run = directory / "w.npz", directory / "run"
    arrays = write_weights(weights)
    assert train(directory, run, weights) == 0
    log = capsys.readouterr().err
    assert "all parameters, the first 8 of 10 positions, temperature 12.18, bias -7\n" in log
    first = open_run(run, 1).params  # the learning rate of the first step is 0
    jax.tree.map(np.testing.assert_array_equal, first["txt"], jax.tree.map(np.float32, nested(arrays)))
    assert (float(first["t"][0]), float(first["b"][0])) == (2.5, -7.0)
    record = json.loads((run / "text_init.json").read_text())
    assert record["sha256"] == sha256(weights)
    assert json.loads((run / "receipt.json").read_text())["text_init"] == record
    last = open_run(run).params

    # Resuming does not need the file and ends with the same bits.
    shutil.rmtree(run / "checkpoints/3")
    weights.rename(directory / "kept.npz")
    assert train(directory, run, weights) == 0
    jax.tree.map(np.testing.assert_array_equal, open_run(run).params, last)

    # Without a checkpoint only the weights that the run started with are accepted.
    shutil.rmtree(run / "checkpoints")
    write_weights(weights, seed=1)
    assert train(directory, run, weights) == 2
    assert "was started with other weights than" in capsys.readouterr().err
    (directory / "kept.npz").rename(weights)
    assert train(directory, run, weights) == 0
    jax.tree.map(np.testing.assert_array_equal, open_run(run).params, last)

    # If all checkpoints are damaged, the run does not silently start from random parameters.
    for step in range(1, 4):
        shutil.rmtree(run / f"checkpoints/{step}/params")
    capsys.readouterr()
    assert train(directory, run, weights) == 2
    assert "rerun the same command to start again from" in capsys.readouterr().err


def test_pretrained_text_tower_that_does_not_fit_is_refused_before_writing(directory, capsys):
    write_weights(directory / "x.npz")
    assert train(directory, directory / "none", directory / "x.npz", "--text.depth", "2") == 2
    assert "set text.depth = 1\n" in capsys.readouterr().err
    assert train(directory, directory / "none", directory / "y.npz") == 2
    assert "y.npz" in capsys.readouterr().err
    assert train(directory, directory / "none", "", "--text.init", "", "--text.head", "false") == 2
    assert "set text.width = 16" in capsys.readouterr().err
    assert not (directory / "none").exists()
