"""Lines of tables: encodings, separators, quotes, compression; every line is counted."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_fast.embed.sources.interface import Damage, Guess, Note, Skipped
from lit_fast.embed.sources.table_entries import Entry, Header, TableRow
from lit_fast.embed.sources.tables import KNOWN_COLUMNS
from lit_fast.embed.sources.text_tables import is_json_lines, read_entries
from lit_fast.errors import UserError

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\x1c\x1d\x1e\x85\u2028\u2029"), max_size=8)


def entries(path: Path, content: bytes | str) -> list[Entry]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_entries(str(path), KNOWN_COLUMNS))


def values(found: list[Entry]) -> list[dict[str, str]]:
    return [entry.values for entry in found if isinstance(entry, TableRow)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables") / "t.csv"


# --- properties


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=6),
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(ENCODINGS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_read_entries_of_written_csv_equals_csv(
    table: Path, rows: list[list[str]], separator: str, end: str, encoding: str, quoting: int
) -> None:
    """Rows that the csv module writes are read as it reads them, whatever is in their fields."""
    # Before Python 3.13 it quotes only those ends of lines that it writes itself.
    bare = [c for c in "\r\n" if c not in end and quoting == csv.QUOTE_MINIMAL]
    assume(not any(c in field for row in rows for field in row for c in bare))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
    header = ["filepath", "a,b;c|d", "title"]
    writer.writerows([header, *([f"{i}.jpg", *row] for i, row in enumerate(rows))])
    text = file.getvalue()
    try:
        found = entries(table, text.encode(encoding))
    except UserError:  # a field with lines that look like rows
        assert ".jpg" in "".join(field for row in rows for field in row)
        return
    wanted = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if row]
    assert found[0] == Header(header) or (encoding.endswith("e") and found[1] == Header(header))
    assert [list(row.values()) for row in values(found)] == [row for row in wanted[1:] if len(row) == 3]
    assert len(values(found)) == len(rows)


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(
        st.tuples(
            st.text(st.sampled_from('ab"\t,;| '), max_size=12) | st.sampled_from(["x.jpg,a", 'y.jpg,"b', ""]),
            st.sampled_from(["\n", "\n", "\r\n", "\r"]),
        ),
        max_size=8,
    ),
    separator=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(ENCODINGS),
    unzip=st.sampled_from([bytes, gzip.compress]),
)
def test_read_entries_accounts_for_every_line(
    table: Path, lines: list[tuple[str, str]], separator: str, encoding: str, unzip: type
) -> None:
    """Lines = header + blank ones + those of rows + skipped ones; or an error that names a line."""
    text = f"filepath{separator}title\n" + "".join(line + end for line, end in lines)
    physical = re.split(r"\r\n|\r|\n", text)[:-1]
    try:
        found = entries(table, unzip(text.encode(encoding)))
    except UserError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert separator in ",;"
        assert re.search(r"t\.csv, line \d+: a quote that opens there", message)
        return
    assert not any(isinstance(entry, Damage) for entry in found)
    rows = [entry for entry in found if isinstance(entry, TableRow)]
    covered = [1, *(int(e.key.removeprefix("line ")) for e in found if isinstance(e, Skipped))]
    covered += [number for row in rows for number in range(row.number, row.number + row.lines)]
    assert len(set(covered)) == len(covered)
    assert not any(line.strip() for i, line in enumerate(physical, 1) if i not in covered)
    assert max(covered) <= len(physical)
    for row in rows:  # the fields of a row are in its lines, in order
        own = "\n".join(physical[row.number - 1 : row.number - 1 + row.lines])
        for value in row.values.values():
            for part in re.split(r'[\r\n"]', value):
                assert part in own


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n\0"), max_size=8), st.booleans()
        ),
        max_size=8,
    )
)
def test_read_entries_of_lines_without_quoting_rules_gives_each_line(
    table: Path, rows: list[tuple[str, bool]]
) -> None:
    """Of a table separated by tabs: stray quotes never join two rows."""
    texts = [('"' if quoted else "") + text for text, quoted in rows]
    content = "".join(f"{i}.jpg\t{text}\n" for i, text in enumerate(texts))
    found = values(entries(table, f"filepath\ttitle\n{content}"))
    assert [row["filepath"] for row in found] == [f"{i}.jpg" for i in range(len(rows))]
    for row, text in zip(found, texts, strict=True):
        assert row["title"] in (text, (next(csv.reader([text], delimiter="\t"), []) or [""])[0])


@settings(max_examples=100, deadline=None)
@given(
    objects=st.lists(
        st.dictionaries(TEXT, TEXT | st.lists(TEXT, max_size=2) | st.none(), max_size=3), max_size=5
    ),
    style=st.sampled_from(["lines", "array", "pretty array", "pretty objects"]),
    encoding=st.sampled_from(ENCODINGS[:3]),
)
def test_read_entries_of_json_gives_all_objects(
    table: Path, objects: list[dict[str, object]], style: str, encoding: str
) -> None:
    path = table.with_suffix(".jsonl")
    indent = 2 if "pretty" in style else None
    if "array" in style:
        text = json.dumps(objects, indent=indent)
    else:
        text = "".join(json.dumps(value, indent=indent) + "\n" for value in objects)
    if style == "pretty objects" and any(not value for value in objects):
        return  # `{}` is an object in one line
    assert values(entries(path, text.encode(encoding))) == objects


# --- single cases


@pytest.mark.parametrize(
    ("header", "row", "names"),
    [
        ("filepath;title, of it", "x.jpg;a", ["filepath", "title, of it"]),
        ('"file;name, x",filepath', "a,x.jpg", ["file;name, x", "filepath"]),
        (
            "image_name| comment_number| comment",
            "x.jpg| 0| a, b",
            ["image_name", "comment_number", "comment"],
        ),
        ("sep=;\r\nfilepath;title", "x.jpg;a", ["filepath", "title"]),
        ("title", "a, b", ["title"]),
        ("filepath,title,", "x.jpg,a", ["filepath", "title", ""]),
        ("filepath, title", 'x.jpg, "a, b"', ["filepath", "title"]),
    ],
)
def test_read_entries_finds_the_separator(table: Path, header: str, row: str, names: list[str]) -> None:
    found = entries(table, f"{header}\n{row}\n")
    assert found[0] == Header(names)
    if names != ["title"]:
        assert len(values(found)) == 1
        assert all(value == value.strip() for value in values(found)[0].values())


def test_read_entries_without_header_numbers_the_columns(table: Path) -> None:
    found = entries(table, "10.jpg#0\tA child , in pink\n10.jpg#1\tA girl\n")
    assert found[0] == Header(["1", "2"], is_numbered=True)
    assert values(found) == [{"1": "10.jpg#0", "2": "A child , in pink"}, {"1": "10.jpg#1", "2": "A girl"}]


def test_read_entries_of_multi_line_fields_in_a_tsv_gives_whole_fields(table: Path) -> None:
    found = entries(table, 'title\tfilepath\n"two\nlines"\tx.jpg\n"a ""b"""\ty.jpg\n"stray\tz.jpg\n')
    assert [row["title"] for row in values(found)] == ["two\nlines", 'a "b"', '"stray']


def test_read_entries_of_utf16_without_mark_is_a_printed_guess(table: Path) -> None:
    text = "filepath,title\nx.jpg,ü\n"
    assert entries(table, text.encode("utf-16-be"))[0] == Guess("encoding = utf-16-be")
    assert not any(isinstance(e, Guess) for e in entries(table, text.encode("utf-16")))


def test_read_entries_of_latin1_names_the_remedy(table: Path) -> None:
    found = entries(table, "filepath,title\nx.jpg,Tür\ny.jpg,a\n".encode("latin-1"))
    [note] = [entry for entry in found if isinstance(entry, Note)]
    assert "has 1 lines that are not UTF-8" in note.text
    assert "iconv -f WINDOWS-1252 -t UTF-8" in note.text


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_read_entries_of_cut_off_compressed_table_is_damage(table: Path, compress: type) -> None:
    text = "filepath,title\n" + "".join(f"{i}.jpg,text {i}\n" for i in range(20_000))
    data = compress(text.encode())
    assert len(values(entries(table, data))) == 20_000
    assert isinstance(entries(table, data[: len(data) // 2])[-1], Damage)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x28\xb5\x2f\xfd" + b"x" * 20, "compressed with zstd"),
        (b"PK\x03\x04xxxx", "a zip or an Excel file"),
    ],
)
def test_read_entries_of_other_files_is_one_line(table: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"t.csv is {message}"):
        entries(table, data)


def test_is_json_lines_is_decided_by_the_first_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, wanted in (
        ('{"a": 1}\n{"a": 2}\n', True),
        ('{"images": [], "annotations": []}\n', False),
        ('{\n  "a": 1\n}\n', False),
        ('[{"a": 1}]', False),
    ):
        path.write_text(text)
        assert is_json_lines(str(path)) is wanted
