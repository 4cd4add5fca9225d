"""Inputs of the fuzz: sources of every format whose images and captions carry their identity, and damaged copies."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from lit_fast.embed.sources.interface import Columns

SECRET = 999_983  # identity of an image outside the directory of the images

_MARK = re.compile(rb"<(\d{1,6}):([0-9a-f]{4})>")
_WORDS = (
    "a dog",
    "two cats; one bowl",
    "été",
    "鳥",
    "it's",
    "a, b",
    "say [this]",
    "{x}",
    "5\u00a0m",
    "é" * 200,
    "- ",
)
_ODD = (None, [], {}, "", -1, 2**70, 1.5, 1e308, True, "\ud800", "../x.jpg", [[[]]], {"raw": 3}, "\0", "NaN")
_TOKENS = (b'"', b"\n", b"\r", b",", b"\t", b"\0", b"[" * 900, b"{", b"}", b"\xff\xfe", b"\xef\xbb\xbf", b"1e999",
           b"\\ud800", b"9" * 5000, b"null", b"..", b"/", b"'", b";", b"|", b":", b"\x80")  # fmt: skip
_OPTIONS = (
    Columns(captions=(("", "text"),)),
    Columns(captions=(("en", "title"), ("de", "caption"))),
    Columns(captions=(("", "txt"),), label="cls"),
    Columns(captions=(("", "meta.caption"),), image="seg.png"),
    Columns(key="id", label="label"),
    Columns(key="text"),
    Columns(image="image"),
    Columns(image="png", language="text"),
    Columns(declined=("captions", "label")),
    Columns(declined=("captions",), label="label"),
)


@dataclass
class Input:
    """A source that can be read, and what is right for it.

    Attributes:
      name: the file or directory to read.
      files: contents by path, relative to a directory; None: a directory.
      rows: identities that must be rows.
      labels: label by identity, if every row must have that.
      truth: whether a row whose image and caption differ is wrong; else only exceptions are looked for.
    """

    format: str
    name: str
    files: dict[str, bytes]
    rows: set[int] = field(default_factory=set)
    labels: dict[int, int] = field(default_factory=dict)
    truth: bool = True
    options: Columns = field(default_factory=Columns)


def mark(identity: int) -> str:
    """Text that names an image; a damaged one is no mark."""
    return f"<{identity}:{zlib.crc32(str(identity).encode()) & 0xFFFF:04x}>"


def marks(data: bytes) -> set[int]:
    """Identities in a text or image."""
    return {int(n) for n, check in _MARK.findall(data) if mark(int(n))[-5:-1].encode() == check}


def image(rng: Random, identity: int) -> bytes:
    return b"\xff\xd8" + mark(identity).encode() + rng.randbytes(rng.choice((0, 1, 40, 500, 509, 510, 2000)))


def caption(rng: Random, identity: int) -> str:
    words = [rng.choice(_WORDS).strip(), mark(identity), *rng.choices(_WORDS, k=rng.randrange(2))]
    return " ".join(words).strip()


def make_tar(rng: Random) -> Input:
    rows: set[int] = set()
    data, labels, identity = b"", {}, rng.randrange(1000)
    for archive in range(rng.choice((1, 1, 1, 2, 3))):
        members, later = [], []
        for number in range(rng.randrange(1, 5)):
            folder, rest = rng.choice(("", "d/", "./", "d.e/")), rng.choice(("", ".5", ".a.b", "_x", " y"))
            stem = f"{folder}{archive}{number}{rest}"
            suffix, texts = (
                rng.choice(("jpg", "png", "JPEG", "webp")),
                rng.choice(("txt", "json", "cls", "txt json")),
            )
            for repeat in range(rng.choice((1, 1, 1, 1, 2))):
                identity += 1
                parts = [(f"{stem}.{suffix}", image(rng, identity))]
                for text in texts.split():
                    words = caption(rng, identity)
                    value = json.dumps({"caption": words}) if text == "json" else words
                    parts.append(
                        (f"{stem}.{text}", str(identity % 1000).encode() if text == "cls" else value.encode())
                    )
                if texts == "cls":
                    labels[identity] = identity % 1000
                if repeat:
                    rows.discard(identity - 1)
                    later += parts
                else:
                    members += parts
                rows.add(identity)
            if rng.random() < 0.1:  # a part is missing: no row
                rows.discard(identity)
                last = later or members
                last.pop(-rng.randrange(1, 2))
                if "json" in texts and "txt" in texts:
                    rows.add(identity)
                if later:  # the replaced pair must not keep half of the new one
                    return make_tar(rng)
        extra = (
            "README",
            "._a.jpg",
            "x.npy",
            "Thumbs.db",
            ".hidden/00.jpg",
            "__MACOSX/00.jpg",
            "x.seg.png",
            "y.txt",
        )
        members += [(name, b"extra") for name in rng.sample(extra, rng.randrange(3))]
        if rng.random() < 0.7:
            rng.shuffle(members)
        file = io.BytesIO()
        kind = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
        with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
            for name, content in members + later:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            if rng.random() < 0.1:
                link = tarfile.TarInfo("link.jpg")
                link.type, link.linkname = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), "../secret.jpg"
                tar.addfile(link)
        data += file.getvalue()
    return Input("tar", "0.tar", {"0.tar": data}, rows, labels)


def _image_files(rng: Random, count: int) -> tuple[list[tuple[str, int]], dict[str, bytes]]:
    """Names with identities, and the files."""
    first = rng.randrange(1000)
    names = [
        (f"{rng.choice(('', 'd/', 'd é/'))}{i}{rng.choice(('', '.2', ' x'))}.{rng.choice(('jpg', 'PNG'))}", i)
        for i in range(first, first + count)
    ]
    return names, {name: image(rng, identity) for name, identity in names}


def make_table(rng: Random) -> Input:
    names, files = _image_files(rng, rng.randrange(1, 6))
    kind = rng.choice(("csv", "tsv", "jsonl", "csv", "semicolon"))
    columns = [rng.choice(("filepath", "image_path", "file_name")), rng.choice(("title", "caption", "text"))]
    with_label = rng.random() < 0.3
    columns += ["label"] * with_label + ["other"] * rng.randrange(2)
    rng.shuffle(columns)
    rows, form = [], rng.choice(("text", "text", "text", "json", "python"))
    words_as_labels = with_label and rng.random() < 0.3
    for name, identity in names:
        words = caption(rng, identity)
        if form != "text":
            several = [words, caption(rng, identity)]
            words = json.dumps(several) if form == "json" else repr(several)
        elif kind == "csv" and rng.random() < 0.2:
            words += rng.choice(('\nand "more"', "\r\n,x", ' ""', '"'))
        elif kind == "tsv" and rng.random() < 0.2:
            words = rng.choice(('"', "")) + words + rng.choice(('"', ' 5"', '"x'))
        shown = rng.choice((name, f"./{name}"))
        values = [
            {"label": "dog" if words_as_labels else identity % 1000, "other": rng.choice(("", "x"))}.get(
                c, shown if i_path(c) else words
            )
            for c in columns
        ]
        rows += [values] * rng.choice((1, 1, 1, 2))
    if rng.random() < 0.3:
        path = rng.choice(("../secret.jpg", "missing.jpg", "", "d/../../secret.jpg", "d"))
        rows.insert(
            rng.randrange(len(rows) + 1), [path if i_path(c) else 1 if c == "label" else "x" for c in columns]
        )
    newline = rng.choice(("\n", "\r\n"))
    lines = []
    for row in [columns, *rows]:
        if kind == "jsonl":
            lines.append(json.dumps(dict(zip(columns, row, strict=True))))
        elif kind == "tsv":
            lines.append("\t".join(map(str, row)))
        else:
            text = io.StringIO()
            csv.writer(text, delimiter=";" if kind == "semicolon" else ",", lineterminator="").writerow(row)
            lines.append(text.getvalue())
    if kind == "jsonl":
        del lines[0]
    for _ in range(rng.choice((0, 0, 0, 1, 2))):  # lines that are no rows
        wrong = [
            "x",
            "  ",
            "{",
            "[1]",
            "\x00",
            "a\tb\tc\td\te\tf\tg",
            *(['"', '{"a": "b'] if kind in ("tsv", "jsonl") else []),
        ]
        lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(wrong))
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"))
    name = f"t.{'csv' if kind == 'semicolon' else kind}"
    whole = newline.join(lines) + rng.choice(("", newline, newline * 2))
    labels = (
        {identity: identity % 1000 for _, identity in names} if with_label and not words_as_labels else {}
    )
    return Input("table", name, {**files, name: whole.encode(encoding)}, {i for _, i in names}, labels)


def i_path(column: str) -> bool:
    return column in ("filepath", "image_path", "file_name")


def make_json(rng: Random) -> Input:
    names, files = _image_files(rng, rng.randrange(1, 6))
    form = rng.choice(("coco", "coco", "karpathy", "list"))
    value: dict[str, object] | list[object]
    if form == "list":
        value = [{"file_name": name, "caption": caption(rng, i), "x": []} for name, i in names]
    elif form == "karpathy":
        images = []
        for i, (name, identity) in enumerate(names):
            folder, _, base = name.rpartition("/")
            texts = [{"raw": caption(rng, identity), "tokens": []} for _ in range(rng.randrange(1, 3))]
            place = {"filepath": folder, "filename": base} if folder else {"filename": base}
            images.append({**place, "imgid": i, "split": "train", "sentences": texts})
        rng.shuffle(images)
        value = {"images": images, "dataset": "flickr8k"}
    else:
        text = rng.random() < 0.3
        images = [{"id": str(i) if text else i, "file_name": name, "width": 1} for name, i in names]
        annotations = [
            {"id": n, "image_id": str(i) if text else i, "caption": caption(rng, i)}
            for n, (_, i) in enumerate(names * rng.randrange(1, 3))
        ]
        if rng.random() < 0.2:
            images.append({"id": -1, "file_name": "../secret.jpg", "width": 1})
            annotations += [
                {"id": 0, "image_id": -1, "caption": "x"},
                {"id": 0, "image_id": 12345678, "caption": "x"},
            ]
        rng.shuffle(images)
        rng.shuffle(annotations)
        value = {"images": images, "annotations": annotations}
    return Input("json", "c.json", {**files, "c.json": json.dumps(value).encode()}, {i for _, i in names})


def make_parquet(rng: Random) -> Input:
    names, files = _image_files(rng, rng.randrange(1, 8))
    kind = rng.choice(("bytes", "struct", "path"))
    contents = [files[name] for name, _ in names]
    columns: dict[str, object] = {}
    if kind == "path":
        columns["file_name"] = [name for name, _ in names]
    elif kind == "bytes":
        columns["image"] = contents
    else:
        columns["image"] = [{"bytes": data, "path": None} for data in contents]
    texts = [[caption(rng, i) for _ in range(rng.randrange(1, 3))] for _, i in names]
    columns["text"] = texts if rng.random() < 0.3 else [t[0] for t in texts]
    if with_label := rng.random() < 0.3:
        columns["label"] = [i % 1000 for _, i in names]
    file = io.BytesIO()
    compression = rng.choice(("snappy", "none", "zstd"))
    pq.write_table(pa.table(columns), file, row_group_size=rng.choice((1, 3, 100)), compression=compression)
    labels = {i: i % 1000 for _, i in names} if with_label else {}
    return Input(
        "parquet",
        "a.parquet",
        {**(files if kind == "path" else {}), "a.parquet": file.getvalue()},
        {i for _, i in names},
        labels,
    )


def _varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _example(features: dict[str, list[bytes] | int]) -> bytes:
    """`tf.train.Example`, serialized."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, int):
            feature = _message(3, _message(1, _varint(value)))
        else:
            feature = _message(1, b"".join(_message(1, v) for v in value))
        entries += _message(1, _message(1, name.encode()) + _message(2, feature))
    return _message(1, entries)


def _examples(rng: Random) -> tuple[list[bytes], set[int], dict[int, int]]:
    first, with_label = rng.randrange(1000), rng.random() < 0.3
    identities = set(range(first, first + rng.randrange(1, 6)))
    records = []
    for i in identities:
        features: dict[str, list[bytes] | int] = {
            "image": [image(rng, i)],
            "text": [caption(rng, i).encode() for _ in range(rng.randrange(1, 3))],
        }
        records.append(_example(features | ({"label": i % 1000} if with_label else {})))
    if rng.random() < 0.2:
        records.insert(rng.randrange(1, len(records) + 1), rng.choice((b"", b"\xff\xff", b"junk" * 9)))
    return records, identities, {i: i % 1000 for i in identities} if with_label else {}


def make_records(rng: Random) -> Input:
    records, identities, labels = _examples(rng)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/r"
        writer = ArrayRecordWriter(path, f"group_size:{rng.choice((1, 2, 8))}")
        for record in records:
            writer.write(record)
        writer.close()
        data = Path(path).read_bytes()
    return Input("array_record", "r.array_record", {"r.array_record": data}, identities, labels)


def _masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def make_tfrecord(rng: Random) -> Input:
    records, identities, labels = _examples(rng)
    data = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        data += length + _masked(length) + record + _masked(record)
    return Input("tfrecord", "r.tfrecord", {"r.tfrecord": data}, identities, labels)


def make_folder(rng: Random, *, is_pairs: bool = False) -> Input:
    files, rows, labels, identity = {}, set[int](), {}, rng.randrange(1000)
    folders = rng.sample(("n01440764", "b", "c d", "é", "00000"), rng.randrange(2, 5))
    for label, folder in enumerate(sorted(folders)):
        for number in range(rng.randrange(1, 4)):
            identity += 1
            stem = (
                f"{folder}/{rng.choice(('', 'x/')) if not is_pairs else ''}{number}{rng.choice(('', '.5'))}"
            )
            files[f"{stem}.{rng.choice(('jpg', 'PNG', 'JPEG'))}"] = image(rng, identity)
            rows.add(identity)
            if is_pairs:
                text, kind = caption(rng, identity), rng.choice(("txt", "json"))
                files[f"{stem}.{kind}"] = (text if kind == "txt" else json.dumps({"caption": text})).encode()
            else:
                labels[identity] = label
        if rng.random() < 0.3:
            files[
                f"{folder}/{rng.choice(('._0.jpg', 'Thumbs.db', '.ipynb_checkpoints/1.jpg', 'notes.md'))}"
            ] = b"x"
    if rng.random() < 0.3:
        files[f"{rng.choice(('__MACOSX/0', '.git/0', '.cache/b'))}.jpg"] = b"x"
    return Input("pairs" if is_pairs else "folder", "", files, rows, labels)


MAKERS: dict[str, Callable[[Random], Input]] = {
    "tar": make_tar,
    "table": make_table,
    "json": make_json,
    "tfrecord": make_tfrecord,
    "parquet": make_parquet,
    "array_record": make_records,
    "folder": make_folder,
    "pairs": partial(make_folder, is_pairs=True),
}


def damage(rng: Random, given: Input) -> Input:
    """A copy of an input with a damaged source; in a folder, of one of its files."""
    name = given.name or rng.choice(sorted(given.files))
    data = given.files[name]
    change = rng.randrange(12)
    if given.format == "json" and change < 6:
        data = json.dumps(_odd_json(rng, json.loads(data))).encode()
    elif given.format == "tar" and change < 4:
        data = _damage_header(rng, data)
    elif given.format == "tfrecord" and change < 4:
        data = _damage_record(rng, data)
    elif name.endswith(".jsonl") and change < 4 and data[:1] == b"{":
        lines = data.splitlines()
        number = rng.randrange(len(lines))
        if lines[number].endswith(b"}"):
            lines[number] = json.dumps(_odd_json(rng, json.loads(lines[number]))).encode()
        data = b"\n".join(lines)
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data = _damage_bytes(rng, data)
    options = rng.choice(_OPTIONS) if rng.random() < 0.15 else Columns()
    return Input(given.format, given.name, {**given.files, name: data}, truth=False, options=options)


def _damage_bytes(rng: Random, data: bytes) -> bytes:
    # Half of the damage to the first and last bytes: array_record is mostly padding, parquet has its footer there.
    size, near = len(data), rng.choice((len(data), min(len(data), 600)))
    start = min(size, rng.randrange(near + 1) if rng.random() < 0.7 else size - rng.randrange(near + 1))
    stop = min(size, start + rng.choice((1, 2, 4, 13, 100, 512, 1024)))
    match rng.randrange(9):
        case 0:
            changed = bytes(b ^ 1 << rng.randrange(8) for b in data[start:stop][:2])
            return data[:start] + changed + data[start + len(changed) :]
        case 1:
            return data[:start] + data[stop:]
        case 2:
            return data[:stop] + data[start:]
        case 3:
            return data[:start] + rng.choice(_TOKENS) + data[start:]
        case 4:
            return data[:start]
        case 5:
            return data + rng.choice((data, data[start:], bytes(512), b"x", rng.randbytes(700)))
        case 6:
            return data[:start] + bytes(stop - start) + data[stop:]
        case 7:
            other = rng.randrange(size + 1) // 512 * 512
            return data[:other] + data[start:stop] + data[other + stop - start :]
        case _:
            return data[:start] + rng.randbytes(stop - start) + data[stop:]


def _damage_header(rng: Random, data: bytes) -> bytes:
    """Change fields of a header of a tar, with a right checksum."""
    starts = [m.start() - 257 for m in re.finditer(rb"ustar", data) if m.start() % 512 == 257]
    if not starts:
        return data[: len(data) // 2]
    start = rng.choice(starts)
    header = bytearray(data[start : start + 512])
    for _ in range(rng.randrange(1, 3)):
        at, width = rng.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155), (257, 8)))
        new = rng.choice(
            (rng.randbytes(width), b"\x80" + rng.randbytes(11), b"%011o\0" % rng.choice((0, 1, 512, 5000, 8**11 - 1)),
             b"x", b"L", b"K", b"g", b"S", b"1", b"2", b"5", b"\xff" * 12, b"a/" * 50, b"-1", b"", b"../../secret.jpg")
        )[:width]  # fmt: skip
        header[at : at + width] = new.ljust(width, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def _damage_record(rng: Random, data: bytes) -> bytes:
    """Change one record of a TFRecord file, with right checksums."""
    position, records = 0, []
    while position < len(data):
        size = int.from_bytes(data[position : position + 8], "little")
        records.append(data[position + 12 : position + 12 + size])
        position += size + 16
    number = rng.randrange(len(records))
    records[number] = _damage_bytes(rng, records[number])
    if rng.random() < 0.2:
        records[number] = _example({"image": 3, "text": [b"\xff", b"x"], "label": 2**63})
    whole = b""
    for record in records:
        length = struct.pack("<Q", len(record))
        whole += length + _masked(length) + record + _masked(record)
    return whole


def _odd_json(rng: Random, value: object) -> object:
    """A copy with one node replaced or removed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _odd_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], _odd_json(rng, value[at]), *value[at + 1 :]]
    return rng.choice(_ODD)
