"""The main job by the commands: index, embed, tokenize, train, evaluate, on tars of pictures."""

import io
import json
import tarfile

import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from tests.helpers import samples, write_tar

CONFIG = """
steps = 30
[text]
variant = "mu"
[stream]
global_batch = 32
[optimizer]
name = "adam"
learning_rate = 3e-3
warmup_steps = 5
[evaluate]
every_steps = 10
[checkpoint]
every_steps = 10
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_vit):
    path = tmp_path_factory.mktemp("job")
    for i in range(2):
        write_tar(path / f"pairs/{i:05d}.tar", samples(24, first=24 * i))
    labelled = [(n.replace(".txt", ".cls"), str(i // 3 % 3).encode() if n.endswith(".txt") else b)
                for i, (n, b) in enumerate(samples(12)) if not n.endswith(".json")]  # fmt: skip
    write_tar(path / "wds/test/0.tar", labelled)
    (path / "wds/classnames.txt").write_text("even picture\nodd picture\nother picture\n")
    (path / "wds/zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}\n")
    (path / "c.toml").write_text(CONFIG)
    return path


def run(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_commands_from_tars_to_results_skip_completed_work(directory, tiny_vit, capsys):
    d, e, w = directory / "d", directory / "e", directory / "w"
    out = run(capsys, "index", f"{directory}/pairs/{{00000..00001}}.tar", "--out", d)
    assert "indexed 48 rows with 96 captions from 2 files" in out
    run(capsys, "index", directory / "wds", "--out", e)
    for dataset in (d, e):
        out = run(capsys, "embed", dataset, "--tower", tiny_vit, "--preprocess", "tf-squash")
        assert "0 invalid" in out
    run(capsys, "tokenize", d, "--train-vocab", 285, "--name", "words")
    sets = ["--evaluate.zero_shot", e, "--evaluate.retrieval", d]
    out = run(capsys, "train", directory / "c.toml", "--workdir", w, "--dataset", d, *sets)
    assert "trained 30 steps" in out
    assert "image_retrieval_recall@1" in out

    lines = [json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    for key in (
        "temperature", "bias", "grad_norm", "param_norm", "update_norm", "learning_rate",
        "pairs_per_second", "data_wait_share",
    ):  # fmt: skip
        assert np.isfinite(last[key])
    assert [line["step"] for line in lines if "d/image_retrieval_recall@1" in line] == [10, 20, 30]
    assert list((w / "tensorboard").glob("events.*"))
    assert "global_batch = 32" in (w / "config.toml").read_text()
    assert json.loads((w / "receipt.json").read_text())["pairs_seen"] == 30 * 32

    result = directory / "results.json"
    out = run(capsys, "eval", w, "--zero-shot", e, "--retrieval", d, "--json", result)
    classification, retrieval = json.loads(result.read_text())
    assert classification["task"] == "zeroshot_classification"
    assert set(classification["metrics"]) == {"acc1", "mean_per_class_recall"}
    assert classification["templates"] == 2
    assert retrieval["metrics"]["text_retrieval_recall@1"] == lines[-1]["d/text_retrieval_recall@1"]

    assert "48 valid and 0 invalid rows" in run(capsys, "info", d)
    assert "30 of 30, finished" in run(capsys, "info", w)
    # The same commands again do no work twice.
    assert "already indexed" in run(capsys, "index", f"{directory}/pairs/*.tar", "--out", d)
    assert "is complete" in run(capsys, "embed", d, "--tower", tiny_vit, "--preprocess", "tf-squash")
    assert "is complete" in run(capsys, "tokenize", d, "--train-vocab", 285, "--name", "words")
    assert "is complete" in run(capsys, "train", directory / "c.toml", "--workdir", w, "--dataset", d)


def test_stored_features_of_a_real_tower_fit_its_own_head(realdata, tmp_path, capsys):
    """A daisy is one of ImageNet's classes (985); sunflowers, tulips, roses and dandelions are not."""
    weights = realdata / "vit/Ti_16-augreg-i21k-i1k-224.npz"
    chosen = tmp_path / "t/0.tar"
    chosen.parent.mkdir()
    with tarfile.open(realdata / "wds_tf_flowers/test/0.tar") as tar, tarfile.open(chosen, "w") as out:
        for member in tar.getmembers()[:160]:
            out.addfile(member, io.BytesIO(tar.extractfile(member).read()))
    d = tmp_path / "d"
    run(capsys, "index", chosen, "--out", d)
    run(capsys, "embed", d, "--tower", weights)
    dataset = open_dataset(d)
    features = open_features(dataset).read_all().astype(np.float32)
    labels = np.concatenate([b.labels for b in dataset.iter_blocks()])
    with np.load(weights) as file:
        predicted = (features @ file["head/kernel"] + file["head/bias"]).argmax(1)
    daisies = labels == 0
    assert daisies.sum() >= 10
    assert (predicted[daisies] == 985).mean() > 0.8
    assert (predicted[~daisies] == 985).mean() < 0.35  # dandelions look like daisies
