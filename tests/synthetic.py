"""Write embedded, tokenized datasets of random numbers instead of images, for tests of the training stage."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np

from lit_fast.data.dataset import SHARD, Dataset, Source, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import Features, Manifest
from lit_fast.embed.tokenize import tokenize_dataset
from lit_fast.storage.text_files import write_json

WORDS = "red green blue small large round square happy sad dog cat bird tree house river".split()  # noqa: SIM905


def make_dataset(
    path: Path,
    rows: int,
    *,
    width: int = 16,
    captions: int = 2,
    without_caption: tuple[int, ...] = (),
    invalid: tuple[int, ...] = (),
    vocab: int = 280,
    max_length: int = 8,
    seed: int = 0,
) -> Dataset:
    """Write rows with random captions, features and tokens; row r has 1 + r % `captions` captions.

    The features of row r are a fixed linear map of a bag of its words plus noise, so that there is something to learn.
    Elements 0 and 1 of a feature are r % 128 and r // 128.
    """
    rng = np.random.default_rng(seed)
    writer = DatasetWriter(path)
    bags = np.zeros((rows, len(WORDS)))
    for r in range(rows):
        count = 0 if r in without_caption else 1 + r % captions
        words = rng.choice(len(WORDS), 4, replace=False)
        bags[r, words] = 1
        texts = tuple(" ".join(WORDS[w] for w in rng.permutation(words)) for _ in range(count))
        writer.add(Row(f"{r:06d}", 0, 512 * r, 100, texts, r % 5))
    dataset = writer.finish(
        seed=seed, sources=[Source("/nowhere.tar", 1)], classnames=WORDS[:5], templates=["a {c}"]
    )
    features = bags @ rng.normal(size=(len(WORDS), width)) + 0.1 * rng.normal(size=(rows, width))
    features[:, 0], features[:, 1] = np.arange(rows) % 128, np.arange(rows) // 128
    features[list(invalid)] = 0
    write_features(dataset, features, invalid=invalid)
    tokenize_dataset(path, train_vocab=vocab, name="words", max_length=max_length)
    return open_dataset(path)


def write_features(
    dataset: Dataset, values: np.ndarray, *, tower: str = "tower", invalid: tuple[int, ...] = ()
) -> None:
    """Write a finished feature store of `values` [rows, width]."""
    identity = hashlib.blake2b(tower.encode(), digest_size=16).hexdigest()
    provenance = {"name": tower, "source": f"{tower}.npz", "identity": identity, "width": values.shape[1]}
    provenance |= {"preprocess": {"method": "pil-crop", "size": 32}, "gelu": "exact", "dtype": "float32"}
    store = Features(dataset, tower, provenance)
    write_json(Path(store.path) / "tower.json", provenance)
    array = store.array(create=True)
    for shard in range(dataset.shards):
        first, last = shard * SHARD, min((shard + 1) * SHARD, dataset.rows)
        array[first:last].write(values[first:last].astype(ml_dtypes.bfloat16)).result()
        bad = {r: "damaged" for r in invalid if first <= r < last}
        keys = dataset.shard_keys[shard]
        store.write_manifest(Manifest(shard, first, last - first, keys, identity, bad))


def row_numbers(images: np.ndarray) -> np.ndarray:
    """Return the row numbers that `make_dataset` wrote into the features."""
    values = images.astype(np.int64)
    return values[:, 0] + 128 * values[:, 1]
