"""Mistakes of users: one line on stderr, status 2, and nothing is written or damaged."""

import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from lit_fast.cli.main import main
from lit_fast.data.dataset import Source
from lit_fast.data.dataset_writer import DatasetWriter, Row
from tests.e2e.trainings import TINY
from tests.helpers import samples, tiny_vit_arrays, write_tar
from tests.synthetic import make_dataset

CONFIG = f"steps = 4{TINY}every_steps = 2\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Make datasets, a finished run, a tar and a config."""
    path = tmp_path_factory.mktemp("mistakes")
    make_dataset(path / "d", 40)
    make_dataset(path / "other", 50, seed=1)
    make_dataset(path / "like", 41)
    shutil.rmtree(path / "like/tokens")
    like = ["tokenize", str(path / "like"), "--tokenizer", str(path / "d/tokens/words/tokenizer.model")]
    assert main([*like, "--max-length", "8"]) == 0
    make_dataset(path / "badlabels", 42)
    file = path / "badlabels/dataset.json"
    file.write_text(re.sub(r'"(small|large)",?\s*', "", file.read_text()).replace('"blue",', '"blue"'))
    write_tar(path / "0.tar", samples(3))
    (path / "c.toml").write_text(CONFIG)
    _make_inputs_of_an_image_tower(path)
    assert (
        main(["train", str(path / "c.toml"), "--workdir", str(path / "run"), "--dataset", str(path / "d")])
        == 0
    )
    return path


def _make_inputs_of_an_image_tower(path):
    """Make a tower, a model of another kind, a dataset of a changed tar and one of imported features."""
    np.savez(path / "tiny.npz", **tiny_vit_arrays())
    (path / "resnet").mkdir()
    (path / "resnet/config.json").write_text('{"model_type": "resnet"}')
    save_file({"a": np.zeros(1, np.float32)}, path / "resnet/model.safetensors")
    tokens = ["--tokenizer", str(path / "d/tokens/words/tokenizer.model"), "--max-length", "8"]
    write_tar(path / "images.tar", samples(20))
    assert main(["index", str(path / "images.tar"), "--out", str(path / "images")]) == 0
    assert main(["tokenize", str(path / "images"), *tokens]) == 0
    write_tar(path / "changed.tar", samples(20))
    assert main(["index", str(path / "changed.tar"), "--out", str(path / "changed")]) == 0
    assert main(["tokenize", str(path / "changed"), *tokens]) == 0
    write_tar(path / "changed.tar", samples(21))
    writer = DatasetWriter(path / "imported")
    for row in range(20):
        writer.add(Row(str(row), 0, row, 0, ("a caption",)))
    writer.finish(seed=0, sources=[Source("/features.npy", 1, "features")])
    assert main(["tokenize", str(path / "imported"), *tokens]) == 0


def snapshot(path):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


def mistake(capsys, directory, command):
    """Run a command that must fail and return its one line of error."""
    before = snapshot(directory)
    capsys.readouterr()
    status = main(command.format(p=directory).split())
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-fast: error: ")]
    assert status == 2
    assert len(errors) == 1
    assert snapshot(directory) == before  # nothing written
    return errors[0]


TRAIN = "train {p}/c.toml --workdir {p}/new --dataset {p}/d"
UNLOCK = "train {p}/c.toml --workdir {p}/new --image.train unlocked --dataset {p}"
PLAN = "plan {p}/c.toml --topology "


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: COMMAND"),
        ("trian x", "invalid choice: 'trian'"),
        ("info {p}/none", "{p}/none does not exist"),
        ("info {p}/d --nosuch", "unrecognized arguments: --nosuch"),
        ("index {p}/none.tar --out {p}/new", "none.tar"),
        ("index {p}/none-*.tar --out {p}/new", "none-*.tar"),
        ("index gopher://host/x.tar --out {p}/new", "local"),
        ("index {p}/0.tar --out {p}/d", "choose another --out"),
        ("embed {p}/none --tower x.npz", "dataset {p}/none does not exist; make it with: lit-fast index"),
        ("embed {p}/d --tower {p}/none.npz", "source /nowhere.tar"),
        ("embed {p}/d --tower x.npz --dtype float16", "invalid choice: 'float16'"),
        ("tokenize {p}/d --tokenizer {p}/none.model", "none.model cannot be read"),
        ("tokenize {p}/d --tokenizer {p}/c.toml", "not a sentencepiece model"),
        ("tokenize {p}/d --train-vocab 100000", "no tokenizer with 100000 pieces"),
        ("tokenize {p}/d --train-vocab 270 --name words", "choose another --name"),
        ("train {p}/none.toml --workdir {p}/new", "config {p}/none.toml does not exist"),
        ("train {p}/c.toml --workdir {p}/new", "no dataset is given; add --dataset"),
        ("train {p}/c.toml --dataset {p}/d", "--workdir"),
        (TRAIN + " --dataset {p}/none", "dataset {p}/none does not exist"),
        (TRAIN + " --tower B_8", "no features of tower 'B_8', only of tower"),
        (TRAIN + " --tokenizer bpe", "has no tokens of tokenizer 'bpe', only of words"),
        (TRAIN + " --stream.global_batch 18", "18 is not divisible by the 4 devices"),
        (TRAIN + " --text.keep products --text.microbatches 3", "not divisible by text.microbatches 3"),
        (TRAIN + " --optimizer.learnin-rate 1", "did you mean optimizer.learning_rate?"),
        (TRAIN + " --warmup_steps 1", "did you mean optimizer.warmup_steps?"),
        (TRAIN + " --steps many", "steps must be a whole number, not 'many'"),
        (TRAIN + " --text.variant XXL", "text.variant must be one of"),
        (TRAIN + " --optimizer.learning_rate -1", "optimizer.learning_rate must be at least 0"),
        (TRAIN + " --stream.corrupt_texts 1.1", "stream.corrupt_texts must be at most 1"),
        (TRAIN + " --stream.corrupt_images 0.5", "stream.noise need each other"),
        (TRAIN + " --stream.corrupt_images 0.5 --stream.noise {p}/none", "dataset {p}/none does not exist"),
        (TRAIN + " --steps", "argument --steps: expected one argument"),
        (TRAIN + " steps=3", "unexpected argument 'steps=3'"),
        (TRAIN + " --evaluate.retrieval {p}/other", "no features of the run's tower"),
        (TRAIN + " --evaluate.zero_shot {p}/none", "dataset {p}/none does not exist"),
        (TRAIN + " --evaluate.zero_shot {p}/badlabels", "has label 4 but only 3 class names"),
        (UNLOCK + "/d --image.tower {p}/tiny.npz", "source /nowhere.tar of {p}/d"),
        (UNLOCK + "/changed --image.tower {p}/tiny.npz", "changed.tar has "),
        (UNLOCK + "/imported --image.tower {p}/tiny.npz", "imported as features and has no images to train"),
        (UNLOCK + "/images --image.tower {p}/none.npz", "none.npz' is neither a file nor a name"),
        (UNLOCK + "/images --image.tower {p}/resnet", "model type 'resnet' is not supported"),
        (UNLOCK + "/images", "dataset {p}/images has no features"),
        (UNLOCK + "/images --image.tower {p}/tiny.npz --image.resolution 30", "is not a multiple of"),
        ("train {p}/c.toml --workdir {p}/run --dataset {p}/d --seed 1", "seed is 0 there and 1 now"),
        (
            "train {p}/c.toml --workdir {p}/run --dataset {p}/other",
            "was started with another t",
        ),
        ("train {p}/c.toml --workdir {p}/run --dataset {p}/like", "started with another stream"),
        ("train {p}/c.toml --workdir {p}/d --dataset {p}/d", "is not a run; choose another --workdir"),
        ("train {p}/c.toml --workdir {p}/0.tar --dataset {p}/d", "is a file"),
        ("eval {p}/run", "nothing to evaluate"),
        ("eval {p}/none --retrieval {p}/d", "run {p}/none does not exist"),
        ("eval {p}/d --retrieval {p}/d", "is not a run"),
        ("eval {p}/run --retrieval {p}/none", "dataset {p}/none does not exist"),
        ("eval {p}/run --retrieval {p}/d --step 3", "no checkpoint of step 3; choose from 2, 4"),
        ("plan {p}/none.toml --topology cpu", "config {p}/none.toml does not exist"),
        ("plan {p}/c.toml", "required: --topology"),
        (PLAN + "v9:2x2", "chip 'v9' is unknown; write v4-8, v5litepod-4"),
        (PLAN + "tpu", "chip 'tpu' is unknown"),
        (PLAN + "gpu:h300", "GPU 'h300' is unknown; write gpu:NAME or gpu:NAME:COUNT with one of b200, h200"),
        (PLAN + "gpu", "GPU '' is unknown"),
        (PLAN + "gpu:h100:0", "'0' is not a number of GPUs; write gpu:h100:8"),
        (PLAN + "gpu:h100:3", "16 is not divisible by the 3 devices"),
        (PLAN + "gpu:h100 --text.keep inputs --text.microbatches 3", "not divisible by text.microbatches 3"),
        (PLAN + "gpu:h100 --mfu 33", "--mfu must be above 0 and at most 1, such as 0.4, not 33.0"),
        (PLAN + "gpu:h100 --price nan", "--price nan: 'nan' is not a price"),
        (PLAN + "gpu:h100 --price v9=1", "chip 'v9' is unknown"),
        (PLAN + "gpu:h100 --storage-price -1", "--storage-price must be a price in USD, not -1.0"),
        (PLAN + ",", "--topology names no slice"),
        (PLAN + "gpu:h100,l4 --largest-batch", "--largest-batch needs one slice"),
        (PLAN + "gpu:h100 --json {p}", "--json {p} is a directory"),
        (PLAN + "gpu:h100 --topolgy v4:2x2x1", "unknown config key 'topolgy'"),
        (PLAN + "gpu:h100 --plan.tower augreg/B_9", "tower 'augreg/B_9' is unknown; did you mean augreg/B_"),
        (PLAN + "gpu:h100 --plan.tower B/15", "tower 'B/15' is unknown"),
        (PLAN + "gpu:h100 --plan.max_length 1", "plan.max_length must be at least 2"),
        (PLAN + "gpu:h100 --dataset {p}/none", "dataset {p}/none does not exist"),
        (PLAN + "gpu:l4 --stream.global_batch 1000000000", "does not fit: a step needs an estimated"),
        ("demo --out {p}/0.tar", "0.tar"),
    ],
)
def test_mistake_is_one_line_with_status_two_and_writes_nothing(capsys, directory, command, message):
    if "retrieval {p}/other" in command:  # the same name, another tower
        tower = directory / "other/features/tower/tower.json"
        tower.write_text(tower.read_text().replace('"identity": "', '"identity": "x'))
    assert message.format(p=directory) in mistake(capsys, directory, command)


def test_plan_for_a_tpu_without_libtpu_names_the_extra(capsys, directory, monkeypatch):
    """JAX raises this error where libtpu is missing."""

    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology. See https://...")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    assert "pip install 'lit-fast[tpu]'" in mistake(capsys, directory, PLAN + "v4:2x2x1")


def test_damaged_file_is_named(capsys, directory, tmp_path):
    def damaged(file, content, command):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        (copy / file).write_bytes(content)
        return mistake(capsys, copy, command)

    train = "train {p}/c.toml --workdir {p}/new --dataset {p}/d"
    assert "dataset.json is damaged" in damaged("d/dataset.json", b"{", train)
    assert "dataset.json is damaged" in damaged("d/dataset.json", b"{}", train)
    assert "00000.json is damaged" in damaged("d/features/tower/manifest/00000.json", b"{}", train)
    assert "00000.array_record is damaged" in damaged("d/tokens/words/00000.array_record", b"x" * 99, train)
    assert "tokenizer.model" in damaged("d/tokens/words/tokenizer.model", b"x", train)
    assert "zarr.json" in damaged("d/features/tower/zarr.json", b"{}", train)
    assert "c.toml is not TOML" in damaged("c.toml", b"steps = = 3", train)
    assert "unknown config key 'step' in" in damaged("c.toml", b"step = 3", train)
    assert "must be a whole number" in damaged("c.toml", b"steps = '3'", train)
    evaluate = "eval {p}/run --retrieval {p}/d"
    assert "tower.json is damaged" in damaged("run/tower.json", b"{}", evaluate)
    again = "train {p}/c.toml --workdir {p}/run --dataset {p}/d"
    assert "tokens.json is damaged" in damaged("run/tokens.json", b"[", again)
