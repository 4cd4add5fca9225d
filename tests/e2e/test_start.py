"""A run that starts from published weights: they are taken as they are, read once, and never mixed up."""

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
from tests.weights.test_text import apart, drawn, nested

CONFIG = f"steps = 3{TINY}every_steps = 1\nkeep = 3\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
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


def train(place, run, weights, *more):
    command = ["train", str(place / "c.toml"), "--workdir", str(run), "--dataset", str(place / "d")]
    return main([*command, "--text.init", f"{weights}:txt", *more])


def test_weights_are_taken_once(place, capsys):
    weights, run = place / "w.npz", place / "run"
    arrays = write_weights(weights)
    assert train(place, run, weights) == 0
    said = capsys.readouterr().err
    assert "all parameters, the first 8 of 10 positions, temperature 12.18, bias -7\n" in said
    first = open_run(run, 1).params  # the learning rate of the first step is 0
    jax.tree.map(np.testing.assert_array_equal, first["txt"], jax.tree.map(np.float32, nested(arrays)))
    assert (float(first["t"][0]), float(first["b"][0])) == (2.5, -7.0)
    record = json.loads((run / "text_init.json").read_text())
    assert record["sha256"] == sha256(weights)
    assert json.loads((run / "receipt.json").read_text())["text_init"] == record
    last = open_run(run).params

    # Going on needs the file no more, and ends with the same bits.
    shutil.rmtree(run / "checkpoints/3")
    weights.rename(place / "kept.npz")
    assert train(place, run, weights) == 0
    jax.tree.map(np.testing.assert_array_equal, open_run(run).params, last)

    # A fresh start takes only the weights that the run was begun with.
    shutil.rmtree(run / "checkpoints")
    write_weights(weights, seed=1)
    assert train(place, run, weights) == 2
    assert "was started with other weights than" in capsys.readouterr().err
    (place / "kept.npz").rename(weights)
    assert train(place, run, weights) == 0
    jax.tree.map(np.testing.assert_array_equal, open_run(run).params, last)

    # All checkpoints damaged: it does not quietly begin from fresh parameters.
    for step in range(1, 4):
        shutil.rmtree(run / f"checkpoints/{step}/params")
    capsys.readouterr()
    assert train(place, run, weights) == 2
    assert "rerun the same command to start again from" in capsys.readouterr().err


def test_what_does_not_fit_is_found_before_anything_is_written(place, capsys):
    write_weights(place / "x.npz")
    assert train(place, place / "none", place / "x.npz", "--text.depth", "2") == 2
    assert "set text.depth = 1\n" in capsys.readouterr().err
    assert train(place, place / "none", place / "y.npz") == 2
    assert "y.npz" in capsys.readouterr().err
    assert train(place, place / "none", "", "--text.init", "", "--text.head", "false") == 2
    assert "set text.width = 16" in capsys.readouterr().err
    assert not (place / "none").exists()
