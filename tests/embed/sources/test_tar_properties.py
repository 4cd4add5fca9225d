"""Tars of random members against a plain count of them and a pairing rule of its own."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.embed.sources import tars
from lit_fast.embed.sources.interface import Columns, Damage, Item, Note, Sample, Skipped

IMAGES = ("jpg", "png", "JPG")
TEXTS = ("txt", "TXT", "json", "cls")


class Member(NamedTuple):
    name: str
    type: bytes


STEMS = st.sampled_from(["a", "a.b", "a.b.c", "b", "d/a", "d/a.b", "./b", ".h", "x~", "__MACOSX/a", "é" * 60])
SUFFIXES = st.sampled_from([*IMAGES, *IMAGES, *TEXTS, *TEXTS, "npy", "seg.png", ""])
NAMES = st.builds(lambda stem, suffix: f"{stem}.{suffix}" if suffix else stem, STEMS, SUFFIXES)
TYPES = st.sampled_from([*[tarfile.REGTYPE] * 12, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
ARCHIVES = st.lists(st.lists(st.builds(Member, NAMES, TYPES), max_size=12), min_size=1, max_size=3)


def content(name: str, number: int) -> bytes:
    """Bytes that name the member."""
    if name.endswith("json"):
        return json.dumps({"caption": f"json {number}"} if number % 4 else [number]).encode()
    return str(number).encode() if name.endswith("cls") else f"{name} {number}".encode()


def write(path: Path, archives: list[list[Member]], format: int, zeros: int) -> dict[int, list[str]]:
    """Write the archives one after another; return the names of each."""
    number, names, file = 0, {}, io.BytesIO()
    for i, members in enumerate(archives):
        with tarfile.open(fileobj=(part := io.BytesIO()), mode="w", format=format) as tar:
            for member in members:
                info = tarfile.TarInfo(member.name)
                info.type, data = member.type, content(member.name, number)
                info.size = len(data) if member.type == tarfile.REGTYPE else 0
                tar.addfile(info, io.BytesIO(data))
                number += 1
        names[i] = [member.name for member in members]
        file.write(part.getvalue() + bytes(512 * zeros))
    path.write_bytes(file.getvalue())
    return names


def is_junk(name: str) -> bool:
    return any(
        part in (".h", "__MACOSX") or part.startswith(".h.") or part.endswith("~") for part in name.split("/")
    )


class Expected(NamedTuple):
    rows: dict[
        tuple[int, str], tuple[bytes, tuple[str, ...], int]
    ]  # by archive and key: image, captions, label
    left_out: Counter[str]


def expect(archives: list[list[Member]]) -> Expected:
    """The rule of the docstring of `tars`, member by member."""
    rows, left_out, number = {}, Counter(), 0
    for archive, members in enumerate(archives):
        last: dict[str, tuple[bytes, bytes]] = {}  # name -> type and content of the last member with it
        for member in members:
            name = member.name[2:] if member.name.startswith("./") else member.name
            data, number = content(member.name, number), number + 1
            if member.type == tarfile.DIRTYPE:
                continue
            known = name.rpartition("/")[2].rpartition(".")[0] and name.rpartition(".")[2] in (
                *IMAGES,
                *TEXTS,
            )
            if is_junk(name) or (member.type != tarfile.REGTYPE and not known):
                left_out[name] += 1
                continue
            if not known:  # each is counted or belongs to a row
                last[f"{name} {number}"] = (b"other", name.encode())
                continue
            left_out[name] += name in last
            last[name] = (member.type, data)
        keys: dict[str, dict[str, tuple[bytes, bytes]]] = {}
        for name, value in last.items():
            if value[0] == b"other":  # may be the first that has the key of a row
                keys.setdefault(value[1].decode().rpartition(".")[0], {})
            else:
                keys.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = value
        others = {key for key, parts in keys.items() if not parts}
        first = {
            key.rpartition("/")[0] + "/" + key.rpartition("/")[2].split(".")[0]
            for key in keys
            if key not in others
        }
        for kind, data in last.values():
            folder, _, base = data.decode().rpartition("/") if kind == b"other" else ("", "", "")
            if kind == b"other" and f"{folder}/{base.split('.')[0]}" not in first:
                left_out[data.decode()] += 1
        for key, parts in keys.items():
            if key in others:
                continue
            texts = {s.lower(): data for s, (_, data) in parts.items() if s in TEXTS}
            images = [data for s, (_, data) in parts.items() if s in IMAGES]
            value = json.loads(texts.get("json", b"{}"))
            fields = value if isinstance(value, dict) else {}
            caption = fields.get("caption") or texts.get("txt", b"").decode()
            label = int(texts.get("cls", -1))
            if (
                len(images) == 1
                and len(texts) + 1 == len(parts)
                and all(kind == tarfile.REGTYPE for kind, _ in parts.values())
                and (caption or label >= 0)
            ):
                rows[archive, key] = (images[0], (caption,) if caption else (), label)
            else:
                left_out[key] += 1
    return Expected(rows, +left_out)


def read(path: Path) -> list[Item]:
    return list(tars.read_tar(str(path), Columns()))


@settings(max_examples=150, deadline=None)
@given(ARCHIVES, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.sampled_from([0, 1, 3, 2050]))
def test_rows_and_skipped_entries_are_all_members(
    tmp_path_factory: pytest.TempPathFactory, archives: list[list[Member]], format: int, zeros: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.tar"
    names = write(path, archives, format, zeros)
    with tarfile.open(path, ignore_zeros=True) as tar:
        assert [m.name for m in tar] == [name for archive in names.values() for name in archive]
    expected, found, data = expect(archives), read(path), path.read_bytes()
    rows = [
        (item.key, (data[item.offset : item.offset + item.size], item.captions, item.label))
        for item in found
        if isinstance(item, Sample)
    ]
    assert rows == [(key, row) for (_, key), row in expected.rows.items()]
    assert Counter(item.key for item in found if isinstance(item, Skipped)) == expected.left_out
    assert not any(isinstance(item, Damage) for item in found)


@settings(max_examples=100, deadline=None)
@given(ARCHIVES.map(lambda archives: archives[0]).filter(bool), st.data())
def test_a_tar_that_was_cut_is_damage_or_noted(
    tmp_path_factory: pytest.TempPathFactory, members: list[Member], data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    write(path, [members], tarfile.GNU_FORMAT, 0)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [(m.offset_data + m.size + 511) // 512 * 512 for m in tar]
    length = data.draw(st.one_of(st.integers(0, ends[-1]), st.sampled_from(ends)))
    path.write_bytes(whole[:length])
    found = read(path)
    assert any(
        isinstance(item, Damage) or (isinstance(item, Note) and "without an end mark" in item.text)
        for item in found
    )
    assert all(item.offset + item.size <= length for item in found if isinstance(item, Sample))
