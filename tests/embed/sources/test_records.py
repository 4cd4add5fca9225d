"""array_record files of `tf.train.Example`, as TensorFlow Datasets writes them."""

from __future__ import annotations

import json
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter

from tests.embed.sources.test_formats import FILES, index, rows
from tests.embed.sources.tf_example import example


def test_array_records_of_tfds(tmp_path: Path) -> None:
    root = tmp_path / "3.0.0"
    root.mkdir()
    writer = ArrayRecordWriter(str(root / "flowers-train.array_record-00000-of-00001"), "group_size:1")
    for i, data in enumerate(FILES):
        writer.write(example({"picture": [data], "kind": [i % 2], "id": [b"%d" % i], "size": [1.5]}))
    writer.write(b"\xff\xff")
    writer.write(example({"kind": [0]}))
    writer.close()
    kinds = {
        "picture": "tensorflow_datasets.core.features.image_feature.Image",
        "kind": "x.class_label_feature.ClassLabel",
    }
    features = {name: {"pythonClassName": kind} for name, kind in kinds.items()}
    (root / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (root / "dataset_info.json").write_text("{}")
    (root / "kind.labels.txt").write_text("daisy\nrose\n")
    dataset = index(root, tmp_path / "d", key="id")
    assert dataset.classnames == ("daisy", "rose")
    assert rows(dataset) == {str(i): ([], [], i % 2, data) for i, data in enumerate(FILES)}
    assert dataset.left_out == {
        "not a tf.train.Example (it cannot be parsed)": 1,
        "no key": 1,
    }


def test_captions_of_tfds(tmp_path: Path) -> None:
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(example({"image": [FILES[0]], "captions/text": [b"one", b"two"], "captions/id": [1, 2]}))
    writer.close()
    [row] = rows(index(tmp_path / "a.array_record", tmp_path / "d")).values()
    assert row == (["one", "two"], [], -1, FILES[0])
