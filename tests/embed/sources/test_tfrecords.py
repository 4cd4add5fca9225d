"""TFRecord files as img2dataset and TFDS write them, from tensorboardX's writer of the same framing."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.record_writer import RecordWriter

from lit_fast.data.features import open_features
from lit_fast.data.images.reader import ImageReader
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.formats import FORMATS, format_of
from lit_fast.embed.sources.interface import Columns, Damage, Item, Layout, Sample, Skipped
from lit_fast.errors import UserError
from tests.embed.sources.test_formats import FILES, index, rows
from tests.embed.sources.tf_example import example
from tests.web import file_server


def write_tfrecord(path: Path, records: list[bytes]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.unlink(missing_ok=True)
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()
    return path


def img2dataset_record(number: int) -> bytes:
    """The features of img2dataset's TFRecordSampleWriter, with its empty text for unknown values."""
    key = b"%09d" % number
    meta = {
        "caption": [b"caption %d" % number],
        "url": [b"http://host/x"],
        "key": [key],
        "status": [b"success"],
    }
    sizes = {"width": [48], "height": [40], "original_width": [b""], "similarity": [0.25], "exif": [b"{}"]}
    return example({"jpg": [FILES[number]], "txt": [b"caption %d" % number], **meta, **sizes})


def items(path: Path) -> list[Item]:
    return list(FORMATS["tfrecord"].read(str(path), Columns()))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A directory as img2dataset writes it: two shards, each with its log and its statistics."""
    for shard in range(2):
        path = tmp_path / "output" / f"{shard:05d}.tfrecord"
        write_tfrecord(path, [img2dataset_record(6 * shard + i) for i in range(6)])
        path.with_suffix(".parquet").write_bytes(b"a log")
        path.with_name(f"{shard:05d}_stats.json").write_text("{}")
    return tmp_path / "output"


def test_tfrecords_of_img2dataset_give_their_captions_and_images(
    output: Path, tmp_path: Path, tiny_vit: Path
) -> None:
    dataset = index(output, tmp_path / "d")
    assert rows(dataset) == {f"{i:09d}": ([f"caption {i}"], [], -1, data) for i, data in enumerate(FILES)}
    assert {source.kind for source in dataset.sources} == {"tfrecord"}
    assert not dataset.left_out
    embed_dataset(dataset.path, str(tiny_vit), batch_size=8, workers=2)
    assert np.isfinite(open_features(dataset).read_all().astype(np.float32)).all()


def test_tfrecords_over_http_equal_local_ones(output: Path, tmp_path: Path) -> None:
    with file_server(output) as server:
        away = index_dataset([f"{server.url}/{{00000..00001}}.tfrecord"], tmp_path / "d")
        assert rows(away) == rows(index(output, tmp_path / "e"))


def test_tfrecords_of_tfds_are_known_by_name(tmp_path: Path) -> None:
    root = tmp_path / "3.0.0"
    examples = [example({"image": [data], "label": [i % 2]}) for i, data in enumerate(FILES)]
    write_tfrecord(root / "flowers-train.tfrecord-00000-of-00001", examples)
    kind = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
    (root / "features.json").write_text(
        json.dumps({"featuresDict": {"features": {"label": {"pythonClassName": kind}}}})
    )
    (root / "label.labels.txt").write_text("daisy\nrose\n")
    dataset = index(root, tmp_path / "d")
    assert (dataset.rows, dataset.labelled, dataset.classnames) == (12, 12, ("daisy", "rose"))
    assert sorted(data for _, _, _, data in rows(dataset).values()) == sorted(FILES)


def test_tfrecords_of_tfds_with_two_class_labels_have_the_names_of_the_one_that_is_given(
    tmp_path: Path,
) -> None:
    root = tmp_path / "3.0.0"
    examples = [example({"image": [data], "kind": [0], "family": [1]}) for data in FILES]
    write_tfrecord(root / "flowers-train.tfrecord-00000-of-00001", examples)
    kind = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
    features = {name: {"pythonClassName": kind} for name in ("kind", "family")}
    (root / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (root / "kind.labels.txt").write_text("daisy\nrose\n")
    (root / "family.labels.txt").write_text("asteraceae\nrosaceae\n")
    dataset = index_dataset([str(root)], tmp_path / "d", options=Columns(label="family"))
    assert (dataset.labelled, dataset.classnames) == (12, ("asteraceae", "rosaceae"))


@pytest.mark.parametrize(("compress", "name"), [(gzip.compress, "gzip"), (zlib.compress, "zlib")])
def test_compressed_tfrecord_is_one_line(output: Path, tmp_path: Path, compress: object, name: str) -> None:
    packed = tmp_path / "a.tfrecord"
    packed.write_bytes(compress((output / "00000.tfrecord").read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"a\.tfrecord is compressed with {name}, .*; decompress it"):
        index(packed, tmp_path / "d")


@pytest.mark.parametrize("data", [b"", b"short", bytes(100), b"\xff" * 100])
def test_other_content_is_damage(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tfrecord").write_bytes(data)
    [damage] = items(tmp_path / "a.tfrecord")
    assert isinstance(damage, Damage)
    assert damage.description == f"{tmp_path}/a.tfrecord is damaged, cut off or is not a TFRecord file"


def test_image_of_a_rewritten_tfrecord_is_refused(tmp_path: Path) -> None:
    """The same sizes in another order: whichever check is first, no image gets another's caption."""
    records = [example({"image": [bytes([65 + i]) * 50], "text": [b"text"]}) for i in range(4)]
    path = write_tfrecord(tmp_path / "a.tfrecord", records)
    dataset = index(path, tmp_path / "d")
    write_tfrecord(path, records[::-1])
    with pytest.raises(UserError, match=r"has changed since it was indexed: the image of '.*' is another"):
        ImageReader(dataset).read(0)
    write_tfrecord(path, [b"\xff" * len(record) for record in records])
    with pytest.raises(UserError, match="has changed since it was indexed"):
        ImageReader(dataset).read(0)


RECORDS = st.sampled_from(["row", "no image", "no text", "no example", "bad checksum"])


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(RECORDS, max_size=8), cut=st.one_of(st.none(), st.integers(0, 1000)), data=st.data())
def test_rows_and_left_out_are_all_records(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], cut: int | None, data: st.DataObject
) -> None:
    """Every record up to the damage is a row or a skipped entry with its reason."""
    records = []
    for number, kind in enumerate(kinds):
        features = {"image": [b"image %d" % number], "text": [b"text"], "score": [0.5]}
        if kind == "no image":
            features["image"] = []
        if kind == "no text":
            features["text"] = [b" "]
        records.append(b"\xff\xff" if kind == "no example" else example(features))
    path = write_tfrecord(tmp_path_factory.getbasetemp() / "property.tfrecord", records)
    content, end, whole = bytearray(path.read_bytes()), 0, 0
    for kind, record in zip(kinds, records, strict=True):
        start, end = end, end + 16 + len(record)
        if kind == "bad checksum":
            content[data.draw(st.integers(start + 12, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
        whole += cut is None or end <= cut
    path.write_bytes(content[:cut])
    found = [item for item in items(path) if not isinstance(item, Layout)]
    damages = [item for item in found if isinstance(item, Damage)]
    ends = {sum(16 + len(r) for r in records[: i + 1]) for i in range(len(records))}
    content = content[:cut]
    assert len(damages) == (len(content) not in ends)
    got = [isinstance(item, Sample) for item in found if isinstance(item, Sample | Skipped)]
    assert got == [kind == "row" for kind in kinds[:whole]]
    for item in found:
        if isinstance(item, Sample):
            image = b"image %d" % int(item.key.rpartition("/")[2])
            assert image in content[item.offset : item.offset + item.size]


def test_damage_names_its_position(tmp_path: Path) -> None:
    path = write_tfrecord(tmp_path / "a.tfrecord", [img2dataset_record(i) for i in range(3)])
    content = path.read_bytes()
    second = 16 + len(img2dataset_record(0))
    path.write_bytes(content[:second] + b"\0" + content[second + 1 :])
    assert items(path)[-1] == Damage(f"{path} is damaged at byte {second}: the rest of it is not read")
    path.write_bytes(content[: second + 100])
    assert items(path)[-1] == Damage(
        f"{path} is cut off at byte {second + 100}, inside the record at byte {second}: the rest of it is missing"
    )
    assert format_of(str(path)) == "tfrecord"
