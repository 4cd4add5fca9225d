"""Readers against damaged and hostile files: rows, reasons, damage or one line; never anything else."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.record_writer import RecordWriter

from lit_fast.data.images.decode import ImageError
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.images.tf_examples import ExampleError, parse_example
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.formats import FORMATS, format_of
from lit_fast.embed.sources.interface import Columns, Damage, Guess, Item, Layout, Sample, Skipped
from lit_fast.errors import UserError
from tests.embed.sources.tf_example import example
from tests.helpers import tar_bytes

ROWS = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small valid file of every format, by name."""
    base = tmp_path_factory.mktemp("whole")
    images = [bytes([65 + i]) * 50 for i in range(ROWS)]
    for i, data in enumerate(images):
        (base / f"{i}.jpg").write_bytes(data)
    texts = [f"text {i}" for i in range(ROWS)]
    pq.write_table(pa.table({"image": images, "text": texts}), base / "a.parquet", row_group_size=5)
    struct = [{"bytes": data, "path": "x"} for data in images]
    table = pa.table({"image": struct, "label": [*range(ROWS)]})
    pq.write_table(table, base / "b.parquet", compression="zstd", write_page_checksum=True)
    (base / "t.csv").write_text(
        "filepath\ttitle\n" + "".join(f'{i}.jpg\t"text ""{i}"""\n' for i in range(ROWS))
    )
    lines = (json.dumps({"file_name": f"{i}.jpg", "text": [f"text {i}"]}) for i in range(ROWS))
    (base / "t.jsonl").write_text("\n".join(lines))
    annotations = [{"image_id": i, "caption": f"text {i}"} for i in range(ROWS)]
    coco = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(ROWS)], "annotations": annotations}
    (base / "c.json").write_text(json.dumps(coco))
    members = [
        m for i in range(ROWS) for m in ((f"{i}.jpg", images[i]), (f"{i}.json", b'{"caption": "text"}'))
    ]
    (base / "0.tar").write_bytes(tar_bytes(members, tarfile.PAX_FORMAT))
    writer = ArrayRecordWriter(str(base / "r.array_record"), "group_size:1")
    for i in range(ROWS):
        writer.write(example({"image": [images[i]], "text": [texts[i].encode()]}))
    writer.close()
    writer = RecordWriter(str(base / "r.tfrecord"))
    for i in range(ROWS):
        writer.write(example({"image": [images[i]], "text": [texts[i].encode()], "score": [0.5]}))
    writer.close()
    return {path.name: path.read_bytes() for path in base.iterdir()}


FILES = ("a.parquet", "b.parquet", "t.csv", "t.jsonl", "c.json", "0.tar", "r.array_record", "r.tfrecord")


def path_for(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, bytes], name: str) -> Path:
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    if not folder.exists():
        folder.mkdir()
        for file, data in whole.items():
            if file.endswith(".jpg"):
                (folder / file).write_bytes(data)
    return folder / name


def check(error: UserError, path: Path) -> None:
    """One line that names the file."""
    assert str(path) in str(error)
    assert "\n" not in str(error)


def items(path: Path) -> list[Item]:
    found = FORMATS[format_of(str(path))].read(str(path), Columns())
    return [item for item in found if not isinstance(item, Guess)]


@pytest.mark.parametrize("name", FILES)
def test_whole_files_give_all_rows(
    name: str, whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """So that the damaged ones below are damaged copies of something that can be read."""
    path = path_for(tmp_path_factory, whole, name)
    path.write_bytes(whole[name])
    assert Counter(type(item) for item in items(path)) == {Layout: 1, Sample: ROWS}


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_gives_rows_reasons_or_one_line(
    name: str, whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray(whole[name])
    # array_record files are mostly padding: half of the damage goes to the content and the footer.
    content = len(damaged.rstrip(b"\0")) if name != "r.array_record" else 2000
    end = st.integers(-min(500, len(damaged)), -1)
    where = st.one_of(st.integers(0, len(damaged) - 1), st.integers(0, content - 1), end)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(where)
        damaged[at] = data.draw(st.sampled_from([0, 0x22, 0x7F, 0x80, 0xFF, 0x0A, 0x5B]))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(damaged)))
        del damaged[start : start + data.draw(st.integers(1, 40))]
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    path = path_for(tmp_path_factory, whole, name)
    path.write_bytes(damaged)
    try:
        found = items(path)
    except UserError as error:
        check(error, path)
        return
    for item in found:
        if isinstance(item, Sample):
            assert item.key.encode()
            assert item.captions or item.label >= 0
            assert all(caption.encode() and caption.strip() == caption for caption in item.captions)
        elif isinstance(item, Skipped):
            assert item.reason
        elif isinstance(item, Damage):
            assert item.description.startswith(str(path))


@pytest.mark.parametrize("name", ["a.parquet", "0.tar", "r.array_record", "r.tfrecord"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_after_indexing(
    name: str, whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Reading images of a file that was damaged later: bytes, a bad image or one line."""
    path = path_for(tmp_path_factory, whole, name)
    path.write_bytes(whole[name])
    out = path.parent / "d"
    dataset = index_dataset([str(path)], out, seed=0)
    damaged = bytearray(whole[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))])
    reader = ImageReader(dataset)
    for row in range(dataset.rows):
        try:
            assert isinstance(reader.read(row), bytes)
        except ImageError:
            continue
        except UserError as error:
            check(error, path)


# --- Examples


FEATURES = st.dictionaries(
    st.text(max_size=5),
    st.one_of(
        st.lists(st.binary(max_size=20), max_size=3),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
        st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=3),
    ),
    max_size=4,
)


@given(FEATURES)
def test_examples_equal_protobufs(features: dict[str, list]) -> None:
    want = {
        name: [] if values and isinstance(values[0], float) else values for name, values in features.items()
    }
    assert parse_example(example(features)) == want


@settings(max_examples=300)
@given(FEATURES, st.data())
def test_damaged_examples(features: dict[str, list], data: st.DataObject) -> None:
    record = bytearray(example(features))
    for _ in range(data.draw(st.integers(0, 4))):
        if record:
            record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = parse_example(bytes(record[: data.draw(st.integers(0, len(record)))]))
    except ExampleError:
        return
    assert sum(len(v) for values in parsed.values() for v in values if isinstance(v, bytes)) <= len(record)


@pytest.mark.parametrize("length", [b"\xff\xff\xff\xff\x07", b"\xff" * 9 + b"\x01", b"\xff" * 11, b"\x80"])
def test_lengths_that_lie(length: bytes) -> None:
    with pytest.raises(ExampleError, match="cannot be parsed"):
        parse_example(b"\x0a" + length + b"x")


# --- bombs


def test_deep_and_wrong_json(tmp_path: Path) -> None:
    deep = "[" * 200_000
    (tmp_path / "x.jpg").write_bytes(b"x")
    good = '{"path": "x.jpg", "text": "a"}'
    (tmp_path / "t.jsonl").write_text(
        f'{good}\n{deep}\n{{"path": {deep}\n17\n{{"path": ["x.jpg", 3], "text": "a"}}\n'
    )
    assert [i.reason for i in items(tmp_path / "t.jsonl") if isinstance(i, Skipped)] == [
        "line is not JSON",
        "line is not JSON",
        "line is not a JSON object",
        "no path of an image",
    ]
    (tmp_path / "c.json").write_text(deep)
    assert items(tmp_path / "c.json") == [Damage(f"{tmp_path}/c.json is not JSON")]


def test_a_huge_coco_json_is_not_loaded(tmp_path: Path) -> None:
    with open(tmp_path / "c.json", "wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(UserError, match=r"but JSON above 2 GiB is not read; write it as \.jsonl"):
        items(tmp_path / "c.json")


def test_huge_fields_nuls_and_wrong_counts_of_fields(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    text = f'filepath,title\nx.jpg,{"a" * (2 << 20)}\nx.jpg,a\0b\nx\0.jpg,c\nx.jpg,"d",e\nx.jpg\nx.jpg,f,\n'
    (tmp_path / "t.csv").write_text(text)
    found = Counter(i.reason for i in items(tmp_path / "t.csv") if isinstance(i, Skipped))
    assert found == {
        "not CSV: field larger than field limit (1048576)": 1,
        "path is not UTF-8 text": 1,
        "3 fields, where the first line has 2": 1,
        "1 field, where the first line has 2": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'x.jpg,"a\nb"\nx.jpg,"c\nx.jpg,d\nx.jpg,e',
            "line 4: a quote that opens there never closes; close it",
        ),
        ('x.jpg,"c\n' + "x.jpg,d\n" * 200_000, "line 2: a quote that opens there does not close properly"),
        (
            'x.jpg,a\nx.jpg,"b\nx.jpg,c\nx.jpg,d" e\n',
            "line 3: a quote that opens there does not close properly",
        ),
        (
            'x.jpg,"b\nx.jpg,c\nx.jpg,d"\n',
            "line 2: a quote that opens there closes in line 4, after lines that",
        ),
    ],
)
def test_a_quote_that_does_not_close_is_an_error_that_names_the_line(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    (tmp_path / "t.csv").write_text(f"filepath,title\n{text}")
    with pytest.raises(UserError, match=f"{tmp_path}/t.csv, {message}"):
        items(tmp_path / "t.csv")


def test_sources_that_are_no_files(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer for ever."""
    os.mkfifo(tmp_path / "0.tar")
    for source in (tmp_path / "0.tar", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{source} is not a regular file"):
            index_dataset([str(source)], tmp_path / "d")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Refused before anything is written, since dataset.json could not name them."""
    tar = tmp_path / os.fsdecode(b"\xff.tar")
    tar.write_bytes(tar_bytes([("a.jpg", b"x"), ("a.txt", b"a")]))
    folder = tmp_path / "classes" / os.fsdecode(b"\xfe")
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"x")
    for source, out in ((tar, "d"), (folder.parent, "d"), (tmp_path, os.fsdecode(b"\xfd"))):
        with pytest.raises(UserError, match="is not UTF-8; "):
            index_dataset([str(source)], tmp_path / out)
        assert not (tmp_path / out).exists()


def test_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_fast.embed.sources.text_lines.MAX_LINE", 1000)
    (tmp_path / "x.jpg").write_bytes(b"x")
    (tmp_path / "t.jsonl").write_text(
        '{"path": "x.jpg", "text": "%s"}\n{"path": "x.jpg", "text": "b"}' % ("a" * 5000)
    )
    assert [type(i) for i in items(tmp_path / "t.jsonl")] == [Skipped, Layout, Sample]


def test_an_extended_header_of_absurd_size(tmp_path: Path) -> None:
    """Refused before it is loaded, although the file is that long."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 3 << 30
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(tar_bytes([("a.jpg", b"x"), ("a.txt", b"a")])[:2048])
        file.write(info.tobuf())
        file.truncate(4 << 30)
    found = items(tmp_path / "0.tar")
    # The last row before the damage may continue after it.
    assert [i.reason for i in found if isinstance(i, Skipped)] == ["cut off by damage of the tar"]
    assert "is damaged at byte 2048" in found[1].description


def test_a_row_group_that_no_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(
        pa.table({"image": [b"x" * 5000], "text": ["a"]}), tmp_path / "a.parquet", compression=None
    )
    monkeypatch.setattr("lit_fast.data.images.parquet.MAX_ROW_GROUP", 4000)
    with pytest.raises(UserError, match=r"bytes in row group 0.* write the file with smaller row groups"):
        items(tmp_path / "a.parquet")
