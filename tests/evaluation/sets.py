"""Small datasets to evaluate: colours as labels and captions, with features of a tower that is only described."""

from pathlib import Path
from typing import Any

import numpy as np

from lit_fast.data.dataset import Dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import BFLOAT16, Features, Manifest
from lit_fast.storage.text_files import write_json

WIDTH = 16
COLOURS = ("red", "green", "blue")


def make_dataset(path: Path, labels: list[int], captions: list[tuple[str, ...]], **options: Any) -> Dataset:
    """A dataset without sources."""
    writer = DatasetWriter(path)
    for i, (label, texts) in enumerate(zip(labels, captions, strict=True)):
        writer.add(Row(f"k{i}", 0, 0, 0, texts, label))
    return writer.finish(seed=0, sources=[], **options)


def embed_colours(texts: list[str]) -> np.ndarray:
    """A text points along the axes of the colours in it."""
    counts = np.array([[text.lower().split().count(c) for c in COLOURS] for text in texts], np.float32)
    return counts / (1e-8 + np.linalg.norm(counts, axis=1, keepdims=True))


def multilingual(path: Path) -> Dataset:
    """Three images with captions in German, English and an unknown language; the second has none in German."""
    writer = DatasetWriter(path)
    rows = [
        (("red", "red thing", "blue"), ("en", "de", "de")),
        (("green", "red", "green one"), ("en", "en", "")),
        (("blue", "blue too"), ("en", "de")),
    ]
    for i, (captions, languages) in enumerate(rows):
        writer.add(Row(f"k{i}", 0, 0, 0, captions, -1, languages))
    return writer.finish(seed=0, sources=[])


def provenance(identity: str) -> dict[str, Any]:
    """A tower.json, as far as evaluation reads it."""
    value = {"name": "tiny", "source": "t.npz", "identity": identity, "width": WIDTH, "gelu": "exact"}
    return value | {"dtype": "float32", "preprocess": {"method": "pil-crop", "size": 8, "resize": 8}}


def add_features(data: Dataset, identity: str = "abc") -> None:
    """Random features for the dataset; row 1 is invalid."""
    write_json(Path(data.path) / "features" / "tiny" / "tower.json", provenance(identity))
    features = Features(data, "tiny", provenance(identity))
    values = np.random.default_rng(0).normal(size=(data.rows, WIDTH)).astype(BFLOAT16)
    features.array(create=True)[:].write(values).result()
    features.write_manifest(Manifest(0, 0, data.rows, data.shard_keys[0], identity, {1: "cut off"}))


def coloured(path: Path) -> Dataset:
    """Six rows with labels and captions."""
    captions = [(f"a {COLOURS[i % 3]} thing", f"{COLOURS[i % 3]} one") for i in range(6)]
    return make_dataset(path, [0, 1, 2] * 2, captions, classnames=COLOURS, templates=["a {c} thing"])
