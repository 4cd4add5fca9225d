"""Optimizers of optax by the commands: train, resume to the same bits, evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.runs.run import open_run
from tests.e2e.trainings import TINY, metrics
from tests.synthetic import make_dataset

CONFIG = f"steps = 8{TINY}every_steps = 4\nkeep = 3\n[log]\nevery_steps = 1\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("optimizers")
    make_dataset(path / "d", 40)
    (path / "c.toml").write_text(CONFIG)
    return path


def train(path: Path, run: str, *options: str) -> int:
    command = ["train", str(path / "c.toml"), "--workdir", str(path / run), "--dataset", str(path / "d")]
    return main(
        [*command, "--optimizer.learning_rate", "1e-2", "--evaluate.retrieval", str(path / "d"), *options]
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", ["--optimizer.weight-decay", "0.1"]),
        ("muon", ["--optimizer.b1", "0.95", "--optimizer.momentum-dtype", "bfloat16"]),
        ("schedule_free", ["--optimizer.schedule", "constant"]),
    ],
)
def test_optimizer_trains_and_resumes_to_the_same_bits(path, name, options):
    options = ["--optimizer.name", name, *options]
    assert train(path, name, *options) == 0
    whole = open_run(path / name)
    course = metrics(path / name)
    assert course[8] < course[1]
    for file in ("checkpoints/8", "receipt.json"):
        target = path / name / file
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert train(path, name, *options) == 0
    resumed = open_run(path / name)
    assert resumed.step == whole.step == 8
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert metrics(path / name) == course


def test_schedule_free_checkpoints_hold_the_average_that_the_training_evaluates(path):
    """The updated parameters are stored with the optimizer state, for resuming."""
    assert (
        train(path, "average", "--optimizer.name", "schedule_free", "--optimizer.schedule", "constant") == 0
    )
    out = path / "results.json"
    assert main(["eval", str(path / "average"), "--retrieval", str(path / "d"), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    for name, value in result["metrics"].items():
        assert metrics(path / "average", f"d/{name}")[8] == value
    stored = path / "average/checkpoints/8"
    assert (stored / "params").is_dir()
    names = {leaf["key_metadata"][0]["key"] for leaf in
             json.loads((stored / "rest/_METADATA").read_text())["tree_metadata"].values()}  # fmt: skip
    assert names == {"opt", "step", "bad_step", "params"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", 'optimizer.name = "schedule_free" needs optimizer.schedule = "constant"'),
        ("--optimizer.schedule constant --optimizer.b1 0", "needs optimizer.b1 above 0"),
        ("--optimizer.schedule constant --optimizer.average_decay 0.9", "needs optimizer.average_decay = 0"),
        ("--optimizer.schedule constant --optimizer.momentum_dtype bfloat16", 'momentum_dtype = "float32"'),
        ("--optimizer.name lion --log.report_to tensorboard,comet", "log.report_to 'comet' is unknown"),
        (
            "--optimizer.name lion --log.wandb x",
            "log.wandb on the command line was renamed; write log.report_to",
        ),
    ],
)
def test_options_without_meaning_are_refused_in_one_line(path, capsys, options, message):
    assert train(path, "none", "--optimizer.name", "schedule_free", *options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (path / "none").exists()
