"""The tar reader: rows, skipped entries and damage."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.embed.sources import tars
from lit_fast.embed.sources.interface import Columns, Damage, Sample, Skipped
from lit_fast.errors import UserError
from tests.helpers import samples, tar_bytes, write_tar


@dataclass(frozen=True)
class Found:
    """The content of a tar: `(key, offset, size, captions, label)` per row, and the skipped entries."""

    rows: list[tuple[str, int, int, tuple[str, ...], int]]
    left_out: list[tuple[str, str]]
    damage: str


def read_tar(path: Path) -> Found:
    found = list(tars.read_tar(str(path), Columns()))
    return Found(
        [(i.key, i.offset, i.size, i.captions, i.label) for i in found if isinstance(i, Sample)],
        [(i.key, i.reason) for i in found if isinstance(i, Skipped)],
        "".join(i.description for i in found if isinstance(i, Damage)),
    )


def left_out(path: Path) -> dict[str, str]:
    return dict(read_tar(path).left_out)


def test_rows_point_at_the_images(tmp_path: Path) -> None:
    members = samples(3)
    path = write_tar(tmp_path / "0.tar", members)
    found = read_tar(path)
    assert not found.left_out
    assert not found.damage
    data = path.read_bytes()
    images = [d for name, d in members if name.endswith(".jpg")]
    assert [data[o : o + s] for _, o, s, _, _ in found.rows] == images
    assert found.rows[1][0] == "000000001"
    assert found.rows[1][3] == ("picture 1, caption 0", "picture 1, caption 1")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_folders(tmp_path: Path, format: int) -> None:
    name = f"{'a' * 80}/{'b' * 60}/photo"
    path = write_tar(tmp_path / "0.tar", [(f"{name}.JPG", b"image"), (f"{name}.txt", "é".encode())], format)
    [(key, offset, size, captions, label)] = read_tar(path).rows
    assert (key, captions, label) == (name, ("é",), -1)
    assert path.read_bytes()[offset : offset + size] == b"image"


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"txt": b" a dog \n"}, ("a dog",)),
        (
            {"txt": b"one", "json": b'{"captions": ["one", "two", "one", " ", "two "]}'},
            ("one", "two", "one", "two"),
        ),
        ({"txt": b"one", "json": b'{"caption": "other"}'}, ("other",)),
        ({"json": b'{"caption": ["x", 3, null, "y"], "captions": []}'}, ("x", "y")),
        ({"txt": b"one", "json": b"{"}, ("one",)),
        ({"txt": b"one", "json": b"[" * 100_000}, ("one",)),
        ({"txt": b"one", "json": b'{"caption": null}'}, ("one",)),
        ({"cls": b" 12\n"}, ()),
        ({"cls": b"3", "txt": b"  "}, ()),
    ],
)
def test_captions(tmp_path: Path, members: dict[str, bytes], captions: tuple[str, ...]) -> None:
    path = write_tar(tmp_path / "0.tar", [("k.jpg", b"x"), *((f"k.{s}", d) for s, d in members.items())])
    found = read_tar(path)
    assert [row[3] for row in found.rows] == [captions]
    assert found.rows[0][4] == (int(members["cls"]) if "cls" in members else -1)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"only text"}, "no image"),
        ({"jpg": b"x"}, "no caption and no label"),
        ({"jpg": b"x", "txt": b" \n "}, "no caption and no label"),
        ({"jpg": b"", "txt": b"a"}, "empty image file"),
        ({"jpg": b"x", "txt": b"\xff\xfe"}, "not UTF-8"),
        ({"jpg": b"x", "json": b'{"caption": "\\ud800"}'}, "not UTF-8"),
        ({"jpg": b"x", "txt": b"a", "cls": b"cat"}, "label is not a number"),
        ({"jpg": b"x", "cls": b"-1"}, "label is not a number"),
        ({"jpg": b"x", "txt": b"a" * (1 << 20) + b"a"}, "above 1 MiB"),
        ({"jpg": b"x", "png": b"y", "txt": b"a"}, "duplicate key"),
    ],
)
def test_left_out_with_a_reason(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    bad = [(f"bad.{suffix}", data) for suffix, data in members.items()]
    path = write_tar(tmp_path / "0.tar", [*bad, ("good.jpg", b"x"), ("good.txt", b"a")])
    found = read_tar(path)
    assert "good" in [row[0] for row in found.rows]
    assert reason in dict(found.left_out)["bad"]


def test_only_regular_files_become_rows(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
            text = tarfile.TarInfo(name.replace("jpg", "txt"))
            text.size = 1
            tar.addfile(text, io.BytesIO(b"t"))
    found = read_tar(path)
    assert found.rows == []
    assert all("not a regular file" in reason for _, reason in found.left_out)
    assert [key for key, _ in found.left_out] == ["a", "b", "c"]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    data = tar_bytes([("bad.jpg", b"x"), ("bad.txt", b"a")]).replace(b"bad.", b"b\xffd.")
    fixed = io.BytesIO()
    for block in range(0, len(data), 512):  # the headers' checksums
        part = bytearray(data[block : block + 512])
        if part.startswith(b"b\xffd."):
            part[148:156] = b" " * 8
            part[148:156] = b"%06o\0 " % sum(part)
        fixed.write(part)
    path = tmp_path / "0.tar"
    path.write_bytes(fixed.getvalue())
    assert list(left_out(path).values()) == ["file name is not UTF-8"]


def test_retrieval_sets_have_a_caption_per_line(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("k.jpg", b"x"), ("k.txt", b"one\ntwo\r\n\nthree")])
    assert read_tar(path).rows[0][3] == ("one\ntwo\r\n\nthree",)
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    assert read_tar(path).rows[0][3] == ("one", "two", "three")


def header(data: bytes, name: str) -> int:
    """The offset of a member's header."""
    return data.index(name.encode() + b"\0" * 10)


def test_a_damaged_header_in_mid_file_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples(5))
    data = bytearray(path.read_bytes())
    position = header(data, "000000003.jpg")
    data[position + 130] ^= 1
    path.write_bytes(data)
    found = read_tar(path)
    assert f"0.tar is damaged at byte {position}: the rest of it is not read" in found.damage
    assert [row[0] for row in found.rows] == ["000000000", "000000001"]
    assert left_out(path) == {"000000002": "cut off by damage of the tar"}  # more of it may have followed


def test_a_truncated_member_is_left_out_and_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples(3))
    data = path.read_bytes()
    path.write_bytes(data[: header(data, "000000001.jpg") + 512 + 100])
    found = read_tar(path)
    assert [row[0] for row in found.rows] == ["000000000"]
    assert "000000001" in left_out(path)
    assert "cut off" in found.damage
    assert "000000001.jpg" in found.damage


def test_a_tar_without_its_final_zeros_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", samples(2))
    data = path.read_bytes()
    path.write_bytes(data[: len(data.rstrip(b"\0"))])  # not even padded
    found = read_tar(path)
    assert len(found.rows) == 2
    assert found.damage == ""


@pytest.mark.parametrize("data", [b"", b"no tar at all", bytes(range(256)) * 40])
def test_other_files_are_reported_as_such(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    assert read_tar(path).damage == f"{path} is not a tar file"


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(samples(1))))
    with pytest.raises(UserError, match=r"compressed with gzip.*; decompress it"):
        read_tar(path)


WHOLE = tar_bytes(
    [m for i in range(3) for m in ((f"k{i}.jpg", bytes([i]) * 600), (f"k{i}.txt", f"text {i}".encode()))]
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_gives_fewer_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never another exception, never a row outside the file."""
    damaged = bytearray(WHOLE)
    position = st.one_of(st.integers(0, len(WHOLE) - 1), st.integers(0, 511))
    for where, value in data.draw(st.lists(st.tuples(position, st.integers(0, 255)), max_size=8)):
        damaged[where] = value
    if data.draw(st.booleans()):  # a wrong field behind a right checksum
        for field, width in ((124, 12), (156, 1), (0, 100)):
            if data.draw(st.booleans()):
                damaged[field : field + width] = data.draw(st.binary(min_size=width, max_size=width))
        damaged[148:156] = b" " * 8
        damaged[148:156] = b"%06o\0 " % sum(damaged[:512])
    del damaged[data.draw(st.integers(0, len(WHOLE))) :]
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(damaged)
    try:
        found = read_tar(path)
    except UserError:
        return
    assert all(o > 0 and size > 0 and o + size <= len(damaged) for _, o, size, _, _ in found.rows)
    assert all(captions or label >= 0 for _, _, _, captions, label in found.rows)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(WHOLE.rstrip(b"\0"))))
def test_truncation_never_changes_a_row(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    base = tmp_path_factory.getbasetemp()
    whole, cut = base / "whole.tar", base / "cut.tar"
    whole.write_bytes(WHOLE)
    cut.write_bytes(WHOLE[:length])
    rows, found = read_tar(whole).rows, read_tar(cut)
    assert found.rows == rows[: len(found.rows)]
    with tarfile.open(whole) as tar:
        if any(m.offset < length < m.offset_data + m.size for m in tar):
            assert found.damage


def test_json_of_img2dataset_on_real_data(realdata: Path) -> None:
    found = read_tar(realdata / "flickr8k/dev/00000.tar")
    assert len(found.rows) == 1000
    assert sum(len(row[3]) for row in found.rows) == 5000
    with tarfile.open(realdata / "flickr8k/dev/00000.tar") as tar:
        file = tar.extractfile("000000007.json")
        assert file is not None
        assert list(found.rows[7][3]) == json.load(file)["captions"]
