"""array_record files of `tf.train.Example`, as TensorFlow Datasets writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.embed.sources.interface import Columns, Damage, Note, Sample, Skipped
from lit_fast.embed.sources.records import read_records
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


def write_records(path: Path, count: int) -> bytes:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range(count):
        writer.write(example({"image": [b"%d" % i], "text": [b"text %d" % i]}))
    writer.close()
    return path.read_bytes()


def test_records_with_data_behind_their_end_or_cut_off_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    data = write_records(path, 5)
    for wrong in (data + b"x", data + bytes(1 << 16), data[:-1], data[: 1 << 16], b"x", b""):
        path.write_bytes(wrong)
        assert list(read_records(str(path), Columns())) == [
            Damage(f"{path} is damaged or is not an array_record file")
        ]
    path.write_bytes(data + data)
    assert list(read_records(str(path), Columns())) == [
        Damage(f"{path} holds another array_record file from byte {len(data)} on: none of it is read")
    ]


def test_the_number_of_records_is_compared_with_that_of_tfds(tmp_path: Path) -> None:
    path = tmp_path / "flowers-train.array_record-00001-of-00002"
    write_records(path, 5)
    splits = [{"name": "test", "shardLengths": ["1"]}, {"name": "train", "shardLengths": ["3", "5"]}]
    info = tmp_path / "dataset_info.json"
    notes: dict[str, list[str]] = {}
    for text in (
        json.dumps({"splits": splits}),
        json.dumps({"splits": splits}).replace('"5"', '"9"'),
        "{",
        "7",
    ):
        info.write_text(text)
        notes[text] = [i.text for i in read_records(str(path), Columns()) if isinstance(i, Note)]
    wrong = f"{path} has 5 records, but dataset_info.json beside it says 9"
    assert list(notes.values()) == [[], [wrong], [], []]


RECORDS = st.lists(
    st.sampled_from(["good", "junk", "no image", "empty image", "no text", "number"]), max_size=40
)


@settings(max_examples=30, deadline=None)
@given(RECORDS, st.integers(1, 10))
def test_every_record_is_a_row_or_skipped(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], group: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.array_record"
    writer = ArrayRecordWriter(str(path), f"group_size:{group}")
    writer.write(example({"image": [b"first"], "text": [b"first"]}))  # it decides about the columns
    for number, kind in enumerate(kinds, 1):
        image = {"no image": [], "empty image": [b""], "number": [number]}.get(kind, [b"%d" % number])
        text = [] if kind == "no text" else [b"text %d" % number]
        writer.write(b"\xff\xff" if kind == "junk" else example({"image": image, "text": text}))
    writer.close()
    reader = ArrayRecordReader(str(path))  # the independent counter
    items = list(read_records(str(path), Columns()))
    rows = {i.offset: i.captions for i in items if isinstance(i, Sample)}
    skipped = [int(i.key.rpartition("/")[2]) for i in items if isinstance(i, Skipped)]
    assert sorted([*rows, *skipped]) == list(range(reader.num_records())) == list(range(len(kinds) + 1))
    good = {number: (f"text {number}",) for number, kind in enumerate(kinds, 1) if kind == "good"}
    assert rows == {0: ("first",), **good}
    reader.close()
