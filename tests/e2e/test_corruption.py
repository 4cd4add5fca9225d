"""A training on corrupted data by the commands, with noise that the run's own tower has embedded."""

import shutil

import jax
import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.runs.run import open_run
from tests.e2e.trainings import TINY
from tests.helpers import samples, write_tar

CONFIG = f"steps = 4{TINY}every_steps = 2\n[log]\nevery_steps = 1\n"
CORRUPT = ["--stream.corrupt_images=0.5", "--stream.corrupt_texts=0.25", "--stream.corrupt_alignment=0.5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vit):
    path = tmp_path_factory.mktemp("corruption")
    write_tar(path / "0.tar", samples(40))
    (path / "c.toml").write_text(CONFIG)
    assert main(["index", str(path / "0.tar"), "--out", str(path / "d")]) == 0
    assert main(["index", "noise:8", "--out", str(path / "n")]) == 0
    assert main(["tokenize", str(path / "d"), "--train-vocab", "285"]) == 0
    assert main(["embed", str(path / "d"), "--tower", str(tiny_vit)]) == 0
    return path


def train(place, run, *more):
    command = ["train", str(place / "c.toml"), "--workdir", str(place / run), "--dataset", str(place / "d")]
    return main([*command, *more])


def test_train_and_go_on_with_noise_that_was_moved(place, tiny_vit, capsys):
    noise = [*CORRUPT, "--stream.noise", str(place / "n")]
    assert train(place, "w", *noise) == 2
    assert "no features of the run's tower tiny; make them with: lit-fast embed" in capsys.readouterr().err
    assert not (place / "w").exists()
    assert main(["embed", str(place / "n"), "--tower", str(tiny_vit)]) == 0
    capsys.readouterr()
    assert train(place, "w", *noise) == 0
    said = capsys.readouterr().err
    assert "corrupted: 0.5 of the images, 0.25 of the texts, 0.5 of the alignment" in said

    whole = open_run(place / "w").params
    shutil.rmtree(place / "w/checkpoints/4")
    (place / "n").rename(place / "moved")
    moved = [*CORRUPT, "--stream.noise", str(place / "moved")]
    assert train(place, "w", *moved) == 0
    jax.tree.map(np.testing.assert_array_equal, open_run(place / "w").params, whole)
    capsys.readouterr()
    assert train(place, "w", *moved, "--stream.corrupt_texts=0.3") == 2
    assert "stream.corrupt_texts is 0.25 there and 0.3 now" in capsys.readouterr().err
