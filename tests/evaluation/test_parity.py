"""Our figures against those of CLIP_benchmark, open_clip and scikit-learn on the same embeddings."""

from __future__ import annotations

import argparse
import csv
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lit_fast.data.dataset import Dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.interface import Columns
from lit_fast.evaluation.bootstrap import point_estimates
from lit_fast.evaluation.evaluate import retrieval_evaluation, zero_shot_evaluation
from lit_fast.evaluation.ranks import ranks
from lit_fast.evaluation.zeroshot import accuracies, accuracy_table
from lit_fast.storage.text_files import json_bytes
from tests.helpers import encoded, picture
from tests.torch_packages import import_package

WIDTH = 24


def benchmark(name: str) -> Any:
    """A module of CLIP_benchmark; skips without it."""
    pytest.importorskip("torch")
    for package in ("torchvision", "open_clip"):
        import_package(package)
    return pytest.importorskip(f"clip_benchmark.{name}")


def scalar(value: Any) -> float:
    """`float`, of arrays with one element too: numpy 2.4 no longer takes them, and both packages give it some."""
    return float(value.item() if isinstance(value, np.ndarray) else value)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class Embedded:
    """A model for CLIP_benchmark whose images and texts are embeddings."""

    def encode_image(self, images: Any) -> Any:
        return images

    def encode_text(self, texts: Any) -> Any:
        return texts


class TextVectors:
    """A vector for every text, equal for equal texts, in place of tokenizer and text tower."""

    def __init__(self) -> None:
        self._known: dict[str, np.ndarray] = {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        for text in texts:
            rng = np.random.default_rng(len(self._known))
            self._known.setdefault(text, unit(rng.normal(size=WIDTH)))
        return np.stack([self._known[text] for text in texts])

    def tokenize(self, texts: list[str]) -> Any:
        import torch

        return torch.from_numpy(self(texts))


def labelled(path: Path, classes: int, images: int) -> tuple[Dataset, np.ndarray]:
    """A dataset of unevenly frequent classes, in lower case and without punctuation: its texts are canonical."""
    rng = np.random.default_rng(classes)
    labels = np.minimum(rng.geometric(0.15, images) - 1, classes - 1)
    writer = DatasetWriter(path)
    for i, label in enumerate(labels.tolist()):
        writer.add(Row(f"k{i}", 0, 0, 0, (), label))
    names, templates = [f"class {i}" for i in range(classes)], ["a {c}", "the {c} here", "{c}"]
    return writer.finish(seed=0, sources=[], classnames=names, templates=templates), labels


@pytest.mark.parametrize(("classes", "images"), [(40, 700), (4, 90)])
def test_zero_shot_equals_clip_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, images: int
) -> None:
    torch = pytest.importorskip("torch")
    theirs = benchmark("metrics.zeroshot_classification")
    monkeypatch.setattr(theirs, "float", scalar, raising=False)
    data, labels = labelled(tmp_path / "d", classes, images)
    texts = TextVectors()
    rng = np.random.default_rng(1)
    x = unit(texts([f"class {i}" for i in labels]) + 0.25 * rng.normal(size=(images, WIDTH)))
    [got] = zero_shot_evaluation(data)(np.arange(images), x, texts)

    batches = [
        (torch.from_numpy(x[lo : lo + 64]), torch.from_numpy(labels[lo : lo + 64]))
        for lo in range(0, images, 64)
    ]

    class Loader(list):
        dataset = SimpleNamespace(classes=data.classnames)

    want = theirs.evaluate(
        Embedded(),
        Loader(batches),
        texts.tokenize,
        list(data.classnames),
        list(data.templates),
        "cpu",
        amp=False,
    )
    assert 0.2 < want["acc1"] < 0.9  # neither all right nor all wrong
    # Shares of images are whole numbers over the same number; the mean over classes may be added in another order.
    assert got["metrics"]["acc1"] == want["acc1"]
    if classes >= 5:
        assert got["metrics"]["acc5"] == want["acc5"]
    else:
        assert np.isnan(want["acc5"])  # which is not JSON: ours says nothing
    assert got["metrics"]["mean_per_class_recall"] == pytest.approx(want["mean_per_class_recall"], rel=1e-12)


def test_accuracy_equals_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import_package("torchvision")
    import_package("open_clip")
    theirs = pytest.importorskip("open_clip_train.zero_shot")
    monkeypatch.setattr(theirs, "float", scalar, raising=False)
    rng = np.random.default_rng(0)
    classes, labels = unit(rng.normal(size=(50, WIDTH))), rng.integers(0, 50, 400)
    images = unit(classes[labels] + 0.4 * rng.normal(size=(400, WIDTH)))
    one, five = theirs.accuracy(
        100.0 * torch.from_numpy(images) @ torch.from_numpy(classes).T, torch.from_numpy(labels), topk=(1, 5)
    )
    table = accuracy_table(ranks(images, classes, np.arange(400), labels), labels)
    got = point_estimates(partial(accuracies, 50), table)
    assert (got["acc1"], got["acc5"]) == (one / 400, five / 400)


def captioned(path: Path, images: int, repeats: bool = False) -> Dataset:
    """One to six captions per image; with `repeats`, some of them twice."""
    rng = np.random.default_rng(images)
    writer = DatasetWriter(path)
    for i in range(images):
        count = rng.integers(1, 7)
        numbers = rng.integers(0, count, count) if repeats else range(count)
        writer.add(Row(f"k{i}", 0, 0, 0, tuple(f"caption {j} of {i}" for j in numbers)))
    return writer.finish(seed=0, sources=[])


@pytest.mark.parametrize("repeats", [False, True])
def test_retrieval_equals_clip_benchmark(tmp_path: Path, repeats: bool) -> None:
    torch = pytest.importorskip("torch")
    theirs = benchmark("metrics.zeroshot_retrieval")
    data, texts = captioned(tmp_path / "d", 150, repeats), TextVectors()
    captions = [c for block in data.iter_captions() for c in block]
    rng = np.random.default_rng(1)
    x = unit(np.stack([texts(c).mean(axis=0) for c in captions]) + 0.12 * rng.normal(size=(150, WIDTH)))
    [got] = retrieval_evaluation(data)(np.arange(150), x, texts)
    batches = [(torch.from_numpy(x[lo : lo + 32]), captions[lo : lo + 32]) for lo in range(0, 150, 32)]
    want = theirs.evaluate(Embedded(), batches, texts.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert want.keys() == got["metrics"].keys()
    assert 0.2 < want["image_retrieval_recall@1"] < 0.9
    for name, value in want.items():
        of = got["texts" if name.startswith("image") else "images"]
        # Theirs is a float32 mean; as a number of hits the two are the same.
        assert got["metrics"][name] * of == pytest.approx(round(value * of), abs=1e-9), name


def test_captions_of_flickr8k_are_those_of_clip_benchmark(tmp_path: Path) -> None:
    """A line per caption of which some are equal; CLIP_benchmark counts all, in one set 5000 of 1000 images."""
    theirs = benchmark("datasets.flickr")
    rng = np.random.default_rng(0)
    lines = [f"{i}.jpg,caption {rng.integers(4)}\n" for i in range(30) for _ in range(5)]
    (tmp_path / "flickr8k_test_karpathy.csv").write_text("image,caption\n" + "".join(lines))
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
    file = str(tmp_path / "flickr8k_test_karpathy.csv")
    want = dict(theirs.Flickr(str(tmp_path), file).data)
    data = index_dataset([file], tmp_path / "d", options=Columns(image="image"))
    keys = [key for block in data.iter_blocks() for key in block.keys]
    got = dict(zip(keys, (c for block in data.iter_captions() for c in block), strict=True))
    assert data.captions == 150
    assert got == want


def test_clip_benchmark_builds_its_table_from_our_files(tmp_path: Path) -> None:
    cli = benchmark("cli")
    data, labels = labelled(tmp_path / "classes", 6, 50)
    texts = TextVectors()
    results = zero_shot_evaluation(data)(np.arange(50), texts([f"class {i}" for i in labels]), texts)
    other = captioned(tmp_path / "captions", 20)
    first = texts([c[0] for block in other.iter_captions() for c in block])
    results += retrieval_evaluation(other)(np.arange(20), first, texts)
    directory, table = tmp_path / "results", tmp_path / "benchmark.csv"
    directory.mkdir()
    for number, result in enumerate(results):
        (directory / f"{number}.json").write_bytes(
            json_bytes(result | {"model": "run", "pretrained": "step 7"})
        )
    cli.main_build(argparse.Namespace(files=[str(directory)], output=str(table)))
    with open(table, newline="") as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    assert {row["model_fullname"] for row in rows.values()} == {"run step 7"}
    assert float(rows["classes"]["acc1"]) == results[0]["metrics"]["acc1"]
    recall = rows["captions"]["image_retrieval_recall@5"]
    assert float(recall) == results[1]["metrics"]["image_retrieval_recall@5"]
    assert json.loads(rows["classes"]["interval_95"].replace("'", '"')).keys() == results[0]["metrics"].keys()
