"""Training on corrupted data by the commands, with noise embedded by the tower of the run."""

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
def directory(tmp_path_factory, tiny_vit):
    path = tmp_path_factory.mktemp("corruption")
    write_tar(path / "0.tar", samples(40))
    (path / "c.toml").write_text(CONFIG)
    assert main(["index", str(path / "0.tar"), "--out", str(path / "d")]) == 0
    assert main(["index", "noise:8", "--out", str(path / "n")]) == 0
    assert main(["tokenize", str(path / "d"), "--train-vocab", "285"]) == 0
    assert main(["embed", str(path / "d"), "--tower", str(tiny_vit)]) == 0
    return path


def train(directory, run, *more):
    command = [
        "train",
        str(directory / "c.toml"),
        "--workdir",
        str(directory / run),
        "--dataset",
        str(directory / "d"),
    ]
    return main([*command, *more])


def test_training_on_corrupted_data_resumes_with_noise_that_was_moved(directory, tiny_vit, capsys):
    noise = [*CORRUPT, "--stream.noise", str(directory / "n")]
    assert train(directory, "w", *noise) == 2
    assert "no features of the run's tower tiny; make them with: lit-fast embed" in capsys.readouterr().err
    assert not (directory / "w").exists()
    assert main(["embed", str(directory / "n"), "--tower", str(tiny_vit)]) == 0
    capsys.readouterr()
    assert train(directory, "w", *noise) == 0
    log = capsys.readouterr().err
    assert "corrupted: 0.5 of the images, 0.25 of the texts, 0.5 of the alignment" in log

    whole = open_run(directory / "w").params
    shutil.rmtree(directory / "w/checkpoints/4")
    (directory / "n").rename(directory / "moved")
    moved = [*CORRUPT, "--stream.noise", str(directory / "moved")]
    assert train(directory, "w", *moved) == 0
    jax.tree.map(np.testing.assert_array_equal, open_run(directory / "w").params, whole)
    capsys.readouterr()
    assert train(directory, "w", *moved, "--stream.corrupt_texts=0.3") == 2
    assert "stream.corrupt_texts is 0.25 there and 0.3 now" in capsys.readouterr().err
