"""Columns of parquet files: every type that holds text, at any depth; every row is counted."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data.images.reader import ImageReader
from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources.interface import Columns, Damage, Item, Sample, Skipped
from lit_fast.embed.sources.parquet import read_parquet
from lit_fast.errors import UserError
from tests.embed.contents import captions

TEXT = st.text("ab ", max_size=3)
STRUCT = pa.struct([("raw", pa.list_(pa.string())), ("id", pa.list_(pa.int64()))])
STRUCTS = st.lists(TEXT, max_size=3).map(lambda texts: {"raw": texts, "id": [*range(len(texts))]})
LISTS = st.lists(TEXT | st.none(), max_size=3)

# The type of a column, its values, and the name of the captions in it.
COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any], str]] = {
    "string": (pa.string(), TEXT, "c"),
    "large_string": (pa.large_string(), TEXT, "c"),
    "string_view": (pa.string_view(), TEXT, "c"),
    "binary": (pa.binary(), TEXT.map(str.encode), "c"),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), TEXT, "c"),
    "list": (pa.list_(pa.string()), LISTS, "c"),
    "large_list": (pa.large_list(pa.large_string()), LISTS, "c"),
    "list of dictionary": (pa.list_(pa.dictionary(pa.int32(), pa.string())), LISTS, "c"),
    "fixed_size_list": (pa.list_(pa.string(), 2), st.lists(TEXT, min_size=2, max_size=2), "c"),
    "list of list": (pa.list_(pa.list_(pa.string())), st.lists(LISTS, max_size=2), "c"),
    "list of struct": (
        pa.list_(pa.struct([("raw", pa.string()), ("n", pa.int64())])),
        st.lists(TEXT.map(lambda text: {"raw": text, "n": 1}), max_size=3),
        "c.raw",
    ),
    "struct of lists": (STRUCT, STRUCTS, "c.raw"),
    "deep struct": (pa.struct([("x", STRUCT)]), STRUCTS.map(lambda value: {"x": value}), "c.x.raw"),
    "deep list": (
        pa.list_(pa.struct([("x", STRUCT)])),
        st.lists(STRUCTS.map(lambda value: {"x": value}), max_size=2),
        "c.x.raw",
    ),
}


def texts(value: Any) -> list[str]:
    """All texts in a value that `to_pylist` returned, in order, but those of blanks."""
    match value:
        case str():
            return [value.strip()] if value.strip() else []
        case bytes():
            return texts(value.decode())
        case list():
            return [text for part in value for text in texts(part)]
        case dict():
            return [text for part in value.values() for text in texts(part)]
    return []


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parquet") / "t.parquet"


@pytest.mark.parametrize("kind", COLUMNS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), group=st.integers(1, 4))
def test_read_parquet_captions_equal_pyarrows_values(
    kind: str, file: Path, data: st.DataObject, group: int
) -> None:
    """Named and guessed; rows and skipped ones are as many as the file says."""
    type, values, name = COLUMNS[kind]
    rows = data.draw(st.lists(values | st.none(), min_size=1, max_size=8))
    table = pa.table({"image": [b"x"] * len(rows), "c": pa.array(rows, type)})
    pq.write_table(table, file, row_group_size=group)
    wanted = [texts(value) for value in pq.read_table(file).column("c").to_pylist()]
    for columns in ((("", name),), (("", "c"),)) if "deep" not in kind else ((("", name),),):
        items = list(read_parquet(str(file), Columns(columns)))
        assert not any(isinstance(item, Damage) for item in items)
        found = [list(item.captions) for item in items if isinstance(item, Sample)]
        assert found == [caption for caption in wanted if caption]
        assert len(found) + sum(isinstance(i, Skipped) for i in items) == pq.read_metadata(file).num_rows


def test_index_struct_of_lists_guesses_its_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Hugging Face's Sequence of a dict is written."""
    image = pa.array(
        [{"bytes": b"x", "path": None}] * 2, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    values = pa.array([{"raw": [f"a {i}", f"b {i}"], "id": [1, 2]} for i in range(2)], STRUCT)
    pq.write_table(pa.table({"image": image, "sentences": values}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": image, "annotation": values}), tmp_path / "b.parquet")
    for name, guessed in (("a", "sentences"), ("b", "annotation.raw")):
        dataset = index_dataset([f"{tmp_path}/{name}.parquet"], tmp_path / name)
        assert sorted(captions(dataset)) == [["a 0", "b 0"], ["a 1", "b 1"]]
        assert f"guessed image = image.bytes, captions = {guessed}" in capsys.readouterr().err


def test_index_dotted_names_are_columns_for_every_role(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": f"{i}".encode()}, "m": {"id": f"k{i}", "cls": i, "lang": "en", "text": f"a {i}"}}
        for i in range(3)
    ]
    pq.write_table(pa.table({"s": rows}), tmp_path / "a.parquet", row_group_size=2)
    options = Columns((("", "s.m.text"),), "s.image", "s.m.id", "s.m.cls", "s.m.lang")
    dataset = index_dataset([f"{tmp_path}/a.parquet"], tmp_path / "d", options=options)
    reader = ImageReader(dataset)
    [block] = dataset.iter_blocks()
    for i, key in enumerate(block.keys):
        number = int(key[1:])
        assert reader.read(i) == f"{number}".encode()
        assert (captions(dataset)[i], block.labels[i], block.languages[i]) == (
            [f"a {number}"],
            number,
            ["en"],
        )
    with pytest.raises(UserError, match=r"has no 's.m.txt'; choose from s.m.text, "):
        index_dataset([f"{tmp_path}/a.parquet"], tmp_path / "e", options=Columns((("", "s.m.txt"),)))


def test_read_parquet_with_another_number_of_rows_than_its_footer_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 11, "text": ["a"] * 11}), path)
    data = path.read_bytes()
    size = struct.unpack("<I", data[-8:-4])[0]
    start = len(data) - 8 - size
    # In the footer, the number of rows of the file is the varint of zigzag 11 = 22 with its field header.
    footer = data[start:]
    assert footer.count(b"\x16\x16") >= 1
    position = footer.index(b"\x16\x16")
    path.write_bytes(data[:start] + footer[:position] + b"\x16\x18" + footer[position + 2 :])
    items: list[Item] = list(read_parquet(str(path), Columns()))
    [damage] = [item for item in items if isinstance(item, Damage)]
    assert "is damaged" in damage.description
    assert sum(isinstance(item, Sample) for item in items) <= 11


def test_index_words_as_guessed_labels_beside_captions_are_not_used(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x", b"y"], "text": ["a", "b"], "label": ["dog", "cat"]})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = index_dataset([f"{tmp_path}/a.parquet"], tmp_path / "d")
    assert (dataset.rows, dataset.labelled, dataset.left_out) == (2, 0, {})
