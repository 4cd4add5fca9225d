"""Write datasets of random numbers for `benchmarks.stream` and `benchmarks.startup`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from lit_fast.data.dataset import BLOCK, SHARD, Dataset, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import Features, Manifest
from lit_fast.data.records import FILE_RECORDS, RecordWriter
from lit_fast.data.tokens import encode_record
from lit_fast.storage.text_files import write_json

LENGTH, VOCAB = 16, 32_000
_CAPTIONS = 64  # different records of captions, which repeat


def make_store(path: Path, rows: int, width: int) -> None:
    """Write a dataset of random features with one caption of 16 random tokens per row."""
    writer = DatasetWriter(path)
    for r in range(rows):
        writer.add(Row(f"{r:09d}", 0, 0, 0, ("caption",)))
    dataset = writer.finish(seed=0, sources=[])
    features = _features(dataset, width)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((min(rows, SHARD), width), np.float32).astype(ml_dtypes.bfloat16)
    array = features.array(create=True)
    for shard in range(dataset.shards):
        first, count = shard * SHARD, features.shard_rows(shard)
        array[first : first + count].write(np.roll(values, shard)[:count]).result()
    _write_manifests(features)
    captions = _captions(rng, BLOCK)
    records = RecordWriter(path / "tokens" / "random")
    for block in range(dataset.blocks - 1):
        records.write(captions[block % _CAPTIONS])
    records.write(_captions(rng, rows - (dataset.blocks - 1) * BLOCK)[0])
    records.close()
    _write_tokens(dataset)


def make_linked_store(path: Path, rows: int, width: int) -> None:
    """Write a dataset whose shards are hard links to one file: 100 million rows in a few hundred megabytes.

    Readers see a dataset of full length, but after the first shard all are in the page cache. It has neither index nor
    captions, which training does not read.
    """
    make_store(path, SHARD, width)
    meta = json.loads((path / "dataset.json").read_text())
    shards = -(-rows // SHARD)
    meta |= {"rows": rows, "captions": rows, "shard_keys": [f"{shard:032x}" for shard in range(shards)]}
    write_json(path / "dataset.json", meta)
    dataset = open_dataset(path)
    features = _features(dataset, width)
    features.array(create=True)  # makes it longer
    for shard in range(1, shards):
        Path(features.shard_path(shard)).parent.mkdir()
        os.link(features.shard_path(0), features.shard_path(shard))
    _write_manifests(features)
    captions = _captions(np.random.default_rng(0), BLOCK)
    tokens = path / "tokens" / "random"
    records = RecordWriter(tokens)
    for record in range(FILE_RECORDS):
        records.write(captions[record % _CAPTIONS])
    records.close()
    for number in range(1, -(-dataset.blocks // FILE_RECORDS)):
        os.link(tokens / "00000.array_record", tokens / f"{number:05d}.array_record")
    _write_tokens(dataset)


def _captions(rng: np.random.Generator, rows: int) -> list[bytes]:
    """Return records of `rows` captions each."""
    ids = rng.integers(2, VOCAB, (_CAPTIONS, rows, 1, LENGTH))
    return [encode_record(record.tolist(), VOCAB) for record in ids]


def _features(dataset: Dataset, width: int) -> Features:
    tower = {"name": "random", "source": "none", "identity": "random", "width": width, "dtype": "float32"}
    features = Features(dataset, "random", tower)
    write_json(Path(features.path) / "tower.json", tower)
    return features


def _write_manifests(features: Features) -> None:
    for shard, keys in enumerate(features.dataset.shard_keys):
        features.write_manifest(
            Manifest(shard, shard * SHARD, features.shard_rows(shard), keys, "random", {})
        )


def _write_tokens(dataset: Dataset) -> None:
    meta = {"identity": "random", "vocab_size": VOCAB, "max_length": LENGTH, "pad_id": 1, "truncated": 0}
    write_json(
        Path(dataset.path) / "tokens/random/tokens.json", meta | {"shard_keys": list(dataset.shard_keys)}
    )


def forget(path: Path) -> None:
    """Drop the files of a directory from the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
