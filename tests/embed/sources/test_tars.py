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

from lit_fast.embed.index import index_dataset
from lit_fast.embed.sources import tars
from lit_fast.embed.sources.interface import JUNK, Columns, Damage, Guess, Note, Sample, Skipped
from lit_fast.errors import UserError
from tests.helpers import samples, tar_bytes, write_tar


@dataclass(frozen=True)
class Found:
    """The content of a tar: `(key, offset, size, captions, label)` per row, and the skipped entries."""

    rows: list[tuple[str, int, int, tuple[str, ...], int]]
    left_out: list[tuple[str, str]]
    damage: str
    notes: list[str]
    guesses: list[str]


def read_tar(path: Path, options: Columns | None = None) -> Found:
    found = list(tars.read_tar(str(path), options or Columns()))
    return Found(
        [(i.key, i.offset, i.size, i.captions, i.label) for i in found if isinstance(i, Sample)],
        [(i.key, i.reason) for i in found if isinstance(i, Skipped)],
        "".join(i.description for i in found if isinstance(i, Damage)),
        [i.text for i in found if isinstance(i, Note)],
        [i.text for i in found if isinstance(i, Guess)],
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
        ({"cls": b"cat", "txt": b"a"}, ("a",)),  # a label that is no class number costs no captioned row
    ],
)
def test_captions(tmp_path: Path, members: dict[str, bytes], captions: tuple[str, ...]) -> None:
    path = write_tar(tmp_path / "0.tar", [("k.jpg", b"x"), *((f"k.{s}", d) for s, d in members.items())])
    found = read_tar(path)
    assert [row[3] for row in found.rows] == [captions]
    assert found.rows[0][4] == (int(members["cls"]) if members.get("cls", b"cat") != b"cat" else -1)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"only text"}, "no image"),
        ({"jpg": b"x"}, "no caption and no label"),
        ({"jpg": b"x", "txt": b" \n "}, "no caption and no label"),
        ({"jpg": b"", "txt": b"a"}, "empty image file"),
        ({"jpg": b"x", "txt": b"\xff\xfe"}, "not UTF-8"),
        ({"jpg": b"x", "json": b'{"caption": "\\ud800"}'}, "not UTF-8"),
        ({"jpg": b"x", "cls": b"cat"}, "label is not a number"),
        ({"jpg": b"x", "cls": b"-1"}, "label is not a number"),
        ({"jpg": b"x", "txt": b"a" * (1 << 20) + b"a"}, "above 1 MiB"),
        (
            {"jpg": b"x", "png": b"y", "txt": b"a"},
            "two images for one key (.jpg and .png); choose with --image",
        ),
        ({"jpg": b"x", "txt": b"a", "TXT": b"b"}, "two .txt for one key"),
        ({"jpg": b"x", "json": b"[1]"}, ".json is not a JSON object"),
        ({"jpg": b"x", "json": b'{"caption": "'}, ".json is not a JSON object"),
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
    assert found.notes == [
        f"{path} ends at byte {len(data.rstrip(bytes(1)))} without an end mark: it may have been cut off"
    ]


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


def pairs(path: Path, options: Columns | None = None) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Image and captions by key."""
    data, found = path.read_bytes(), read_tar(path, options)
    assert len({row[0] for row in found.rows}) == len(found.rows)
    return {key: (data[o : o + s], captions) for key, o, s, captions, _ in found.rows}


def test_names_with_dots_are_paired_by_their_stems(tmp_path: Path) -> None:
    stems = ["IMG_1", "IMG_1.2", "22.05", "photo.00", "photo.01", "v1.2/x", "v1.2/x.y"]
    members = [(f"{stem}.png", stem.encode()) for stem in stems]
    path = write_tar(tmp_path / "0.tar", [*members, *((f"{stem}.txt", stem.encode()) for stem in stems)])
    assert pairs(path) == {stem: (stem.encode(), (stem,)) for stem in stems}
    assert not read_tar(path).left_out


def test_names_that_agree_up_to_the_first_dot_only_are_no_pair(tmp_path: Path) -> None:
    members = [
        *((f"0.{name}", name.encode()) for name in ("left.jpg", "right.jpg", "caption.txt")),
        ("1.jpg", b"image 1"),
        ("1.txt", b"text 1"),
        ("1.seg.png", b"mask 1"),
        ("2.b.jpg", b"image 2"),
        ("2.txt", b"text 2"),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    reason = "image and text agree up to the first dot of their names only"
    assert pairs(path) == {"1": (b"image 1", ("text 1",))}
    assert left_out(path) == dict.fromkeys(("0.left", "0.right", "0.caption", "1.seg", "2.b", "2"), reason)


def test_a_suffix_of_several_parts_is_one_where_an_option_names_it(tmp_path: Path) -> None:
    contents = {"left.jpg": b"left", "right.jpg": b"right", "caption.txt": b"text", "number.cls": b"7"}
    path = write_tar(tmp_path / "0.tar", [(f"0.{name}", data) for name, data in contents.items()])
    options = Columns((("", "caption.txt"),), image="right.JPG", label="number.cls")
    found = read_tar(path, options)
    assert pairs(path, options) == {"0": (b"right", ("text",))}
    assert [row[4] for row in found.rows] == [7]
    assert found.left_out == []  # left.jpg is of the row
    assert found.guesses == ["members with .jpg = unused"]


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    old = [("a.jpg", b"old"), ("a.txt", b"old"), ("b.jpg", b"b"), ("b.txt", b"b")]
    path = write_tar(tmp_path / "0.tar", [*old, ("./a.txt", b"new"), ("a.jpg", b"new image")])
    assert pairs(path) == {"a": (b"new image", ("new",)), "b": (b"b", ("b",))}
    reason = "replaced by a later member of the same name"
    assert read_tar(path).left_out == [("a.txt", reason), ("a.jpg", reason)]


def test_members_that_are_not_used_are_counted_or_named(tmp_path: Path) -> None:
    row = [("a.jpg", b"x"), ("a.txt", b"x"), ("a.npy", b"x"), ("a.mask.npy", b"x")]
    others = [("README", b"x"), ("b.npy", b"x"), ("d/Thumbs.db", b"x"), ("._a.jpg", b"x"), (".txt", b"x")]
    found = read_tar(write_tar(tmp_path / "0.tar", [*row, *others]))
    other = "suffix of no image, text or label"
    assert [key for key, *_ in found.rows] == ["a"]
    want = [("d/Thumbs.db", JUNK), ("._a.jpg", JUNK), (".txt", JUNK), ("README", other), ("b.npy", other)]
    assert found.left_out == want
    assert found.guesses == ["captions = txt", "members with .npy = unused"]


def test_a_json_that_cannot_be_read_beside_a_text_is_noted(tmp_path: Path) -> None:
    good = [("b.jpg", b"x"), ("b.json", b'{"caption": "b"}'), ("b.txt", b"b")]
    path = write_tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.txt", b"text"), ("a.json", b"{"), *good])
    assert pairs(path) == {"a": (b"x", ("text",)), "b": (b"x", ("b",))}
    assert "a .json is not a JSON object" in read_tar(path).notes[0]
    assert read_tar(path, Columns((("", "txt"),))).left_out == []
    assert read_tar(path, Columns((("", "caption"),))).left_out == [("a", ".json is not a JSON object")]


def test_archives_one_after_another_are_all_read(tmp_path: Path) -> None:
    one = tar_bytes([("a.jpg", b"a"), ("a.txt", b"a"), ("b.jpg", b"no text here")])
    two = tar_bytes([("b.txt", b"no image here"), ("c.jpg", b"c"), ("c.txt", b"c")], tarfile.PAX_FORMAT)
    path = tmp_path / "0.tar"
    path.write_bytes(one + two)
    assert pairs(path) == {"a": (b"a", ("a",)), "c": (b"c", ("c",))}
    found = read_tar(path)
    assert found.damage == ""
    assert [key for key, _ in found.left_out] == ["b", "b"]
    assert found.notes == [f"{path} holds 2 archives one after another, all of which are read"]


def test_keys_of_an_earlier_archive_of_the_file_are_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes(samples(2)) + tar_bytes(samples(2, first=1)))
    dataset = index_dataset([str(path)], tmp_path / "d")
    assert (dataset.rows, dataset.left_out) == (3, {"duplicate key": 1})


@pytest.mark.parametrize("zeros", [1024, 10240, 3 << 20])
def test_other_data_behind_the_end_is_damage(tmp_path: Path, zeros: int) -> None:
    data = tar_bytes(samples(2)).rstrip(b"\0")
    data += bytes(-len(data) % 512 + zeros)
    path = tmp_path / "0.tar"
    path.write_bytes(data + b"\0\0other data" * 100)
    found = read_tar(path)
    assert len(found.rows) == 2
    assert f"no archive behind its end, from byte {len(data)} on" in found.damage


def test_a_download_that_was_not_completed_is_noted_and_a_large_hole_is_not_read(tmp_path: Path) -> None:
    """Programs that reserve the space of a file leave zeros where it was not written."""
    path = write_tar(tmp_path / "0.tar", samples(3))
    data = path.read_bytes()
    end = header(data, "000000002.jpg")
    path.write_bytes(data[:end] + bytes(2 << 20))
    found = read_tar(path)
    assert (len(found.rows), found.damage) == (2, "")
    wrong = (
        f"{path} ends at byte {end} before 2,097,152 bytes of zeros: its download may not have been completed"
    )
    assert found.notes == [wrong]
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    found = read_tar(path)
    assert len(found.rows) == 2
    assert "more than 64 MiB of zeros behind its end" in found.damage


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sparse_files_and_links_are_counted_and_passed(tmp_path: Path, format: int) -> None:
    """GNU's three formats of sparse files in pax headers, and the old one."""
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9000"}
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=format) as tar:
        info = tarfile.TarInfo("s.jpg")
        if format == tarfile.PAX_FORMAT:
            info.pax_headers = {**sparse, "GNU.sparse.name": "s.jpg"}
            content = b"1\n0\n5\n".ljust(512, b"\0") + b"image"
        else:
            info.type, content = tarfile.CONTTYPE, b"image"
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        for name, data in (("s.txt", b"text"), ("a.jpg", b"image"), ("a.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = read_tar(path)
    assert found.damage == ""
    assert [key for key, *_ in found.rows] == (["a"] if format == tarfile.PAX_FORMAT else ["s", "a"])


def test_a_size_in_a_pax_header_is_the_size(tmp_path: Path) -> None:
    """As of a member above 8 GiB: the header's own field cannot express it."""
    data = bytearray(tar_bytes([("a.jpg", b"image"), ("a.txt", b"text")]))
    data[124:136] = b"%011o\0" % 0
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    extended = tarfile.TarInfo("x")
    record = b"9 size=5\n"
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "0.tar"
    path.write_bytes(extended.tobuf() + record.ljust(512, b"\0") + data)
    assert pairs(path) == {"a": (b"image", ("text",))}


def raw_member(
    name: bytes, data: bytes, *, size: bytes = b"", magic: bytes = b"", kind: bytes = b"0"
) -> bytes:
    """A member with a header of one's own."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = size or b"%011o\0" % len(data)
    header[156:157] = kind
    header[257 : 257 + len(magic)] = magic
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def test_headers_of_all_ages(tmp_path: Path) -> None:
    members = [
        raw_member(b"a.jpg", b"old", kind=b"\0"),  # of Unix version 7: no magic
        raw_member(b"a.txt", b"a", kind=b"\0"),
        raw_member(b"b.jpg", b"base 256", size=b"\x80" + (8).to_bytes(11, "big"), magic=b"ustar  \0"),
        raw_member(b"b.txt", b"b", magic=b"ustar\x0000"),
        raw_member(b"@LongLink", b"d/" * 80 + b"b.jpg\0", kind=b"L", magic=b"ustar  \0"),
        raw_member(b"cut", b"long", magic=b"ustar  \0"),
        raw_member(b"x", b"14 path=c.jpg\n", kind=b"x", magic=b"ustar\x0000"),
        raw_member(b"x", b"14 path=d.jpg\n", kind=b"x", magic=b"ustar\x0000"),
        raw_member(b"e.jpg", b"two headers", magic=b"ustar\x0000"),
        raw_member(b"c.txt", b"c", magic=b"ustar\x0000"),
        raw_member(b"d.txt", b"d", magic=b"ustar\x0000"),
    ]
    path = tmp_path / "0.tar"
    path.write_bytes(b"".join(members) + bytes(1024))
    found = pairs(path)
    assert found["a"] == (b"old", ("a",))
    assert found["b"] == (b"base 256", ("b",))
    with tarfile.open(path) as tar:
        [name] = [m.name for m in tar if m.size == len(b"two headers")]
    key = name.removesuffix(".jpg")
    assert found[key] == (b"two headers", (key,))
    assert left_out(path)["d/" * 80 + "b"] == "no caption and no label"
    path.write_bytes(b"".join(members[:2]) + raw_member(b"z.jpg", b"", size=b"%011o\0" % 99_999))
    assert "is cut off" in read_tar(path).damage


def test_a_global_header_that_contradicts_the_sizes_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"size": "4000"}) as tar:
        for name in ("a.jpg", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    found = read_tar(path)
    assert (found.rows, "is damaged at byte" in found.damage) == ([], True)


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
