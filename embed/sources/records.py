"""Read files of `tf.train.Example`: array_records and TFRecords, as TensorFlow Datasets and img2dataset write them.

`features.json` in the same directory says which feature is an image, `<label>.labels.txt` has the class names,
`dataset_info.json` the number of records of each file.

A TFRecord file is a sequence of records: length (uint64), masked CRC-32C of the length, data, masked CRC-32C of the
data (tensorflow/core/lib/io/record_writer.h). All checksums are compared at indexing.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any, NamedTuple

import google_crc32c

from lit_fast.data.images.decode import MAX_IMAGE
from lit_fast.data.images.fingerprint import image_checksum
from lit_fast.data.images.tf_examples import ERRORS, ExampleError, open_records, parse_example
from lit_fast.embed.sources.columns import (
    LABEL,
    choose_columns,
    find_guess,
    guess_column,
    parse_key,
    parse_row,
)
from lit_fast.embed.sources.interface import Columns, Damage, Item, Layout, Note, Skipped
from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import join, name, parent
from lit_fast.storage.text_files import read_text

_RECORDS_PER_READ = 64
_BLOCK, _SIGNATURE = 1 << 16, 64  # bytes, of array_record
_MAX_RECORD = 2 * MAX_IMAGE  # bytes
_CHUNK = 1 << 20  # bytes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x78\x01": "zlib", b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}


class _Record(NamedTuple):
    """A record and its location as in `lit_fast.data.dataset.Source`."""

    offset: int
    size: int
    data: bytes
    problem: str = ""  # why it is not used


def read_records(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per record of an array_record; a row without a key is named after its file and number.

    Raises:
      UserError: the records lack a feature, or the file cannot be read.
    """
    return _rows(path, options, "array_record", _array_records(path))


def read_tfrecord(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per record of a TFRecord file; a row without a key is named after its file and number.

    Raises:
      UserError: the records lack a feature, or the file is compressed or cannot be read.
    """
    return _rows(path, options, "tfrecord", _tfrecords(path))


def is_tfrecord(start: bytes) -> bool:
    """Return whether the first 12 bytes of a file are a TFRecord's length with its checksum."""
    return len(start) >= 12 and _masked_crc(start[:8]) == int.from_bytes(start[8:12], "little")


def class_names(path: str, label: str) -> tuple[str, ...]:
    """Return the lines of the `<label>.labels.txt` beside a file; () without one.

    Args:
      path: of the file.
      label: the option that names the feature; "" guesses.
    """
    guesses = dict.fromkeys([*_typed_features(path).get("ClassLabel", []), *LABEL])
    for feature in [label] if label else guesses:
        if "/" not in feature and (text := read_text(join(parent(path), f"{feature}.labels.txt"))):
            return tuple(line.strip() for line in text.splitlines() if line.strip())
    return ()


def _rows(path: str, options: Columns, kind: str, records: Iterator[_Record | Damage]) -> Iterator[Item]:
    columns: Columns | None = None
    count = 0
    for number, record in enumerate(records):
        if isinstance(record, Damage):
            yield record
            return
        count += 1
        own_key = f"{name(parent(path))}/{name(path)}/{number}"
        if record.problem:
            yield Skipped(own_key, record.problem)
            continue
        try:
            values = parse_example(record.data)
        except ExampleError as error:
            yield Skipped(own_key, f"not a tf.train.Example ({error})")
            continue
        if columns is None:
            columns = _columns(path, options, values)
            yield Layout(kind, image=columns.image)
            yield from find_guess(options, columns, list(values))
        yield _sample(own_key, record, values, columns)
    expected = _expected_records(path)
    if expected not in (None, count):
        yield Note(f"{path} has {count:,} records, but dataset_info.json beside it says {expected:,}")


def _sample(own_key: str, record: _Record, values: dict[str, Any], columns: Columns) -> Item:
    row = parse_row(values, columns)
    key, problem = parse_key(values.get(columns.key)) if columns.key else (own_key, "")
    image, check = values.get(columns.image), 0
    if not (image and isinstance(image[0], bytes) and image[0]):
        problem = problem or row.problem or f"no image in {columns.image}"
    elif len(image[0]) > MAX_IMAGE:
        problem = problem or "image file above 256 MiB"
    else:
        check = image_checksum(image[0])
    return row.item(key, record.offset, record.size, problem, own_key, check)


def _array_records(path: str) -> Iterator[_Record | Damage]:
    try:
        reader = open_records(path)
        count = reader.num_records()
    except ERRORS:
        yield Damage(f"{path} is damaged or is not an array_record file")
        return
    if position := _find_second_file(path):
        yield Damage(f"{path} holds another array_record file from byte {position} on: none of it is read")
        return
    first = 0
    try:
        while first < count:
            records = reader.read(first, min(first + _RECORDS_PER_READ, count))
            for number, record in enumerate(records, first):
                yield _Record(number, 0, bytes(record))
            first += len(records)
            if not records:
                raise ValueError("no records where some should be")
    except ERRORS as error:
        yield Damage(
            f"{path} is damaged at record {first} or after: the rest of it is not read ({first_line(error)})"
        )


def _find_second_file(path: str) -> int:
    """Return where another array_record file follows in a file, 0 if none does.

    array_record finds its index at the end of the file, by a position from the start: of two files of equal lengths
    it would read the first only. All begin with the same bytes (riegeli's file signature), and fill whole blocks.
    """
    with open_read(path) as file:
        end, start = file.seek(0, os.SEEK_END), b""
        for position in range(0, end, _BLOCK):
            file.seek(position)
            found = file.read(_SIGNATURE)
            if position and found == start:
                return position
            start = start or found
    return 0


def _tfrecords(path: str) -> Iterator[_Record | Damage]:
    try:
        with open_read(path) as file:
            yield from _framed_records(path, file)
    except OSError as error:
        raise unreadable(path, error) from None


def _framed_records(path: str, file: IO[bytes]) -> Iterator[_Record | Damage]:
    end = file.seek(0, os.SEEK_END)
    position = file.seek(0)
    while position < end or not end:
        frame = file.read(12)
        if not is_tfrecord(frame):
            if not position and (compression := _COMPRESSED.get(frame[:2])):
                raise UserError(
                    f"{path} is compressed with {compression}, where images cannot be read by their offset; "
                    "decompress it"
                )
            if not position:
                yield Damage(f"{path} is damaged, cut off or is not a TFRecord file")
            elif len(frame) < 12:
                yield Damage(
                    f"{path} is cut off at byte {end}, in a record's length: the rest of it is missing"
                )
            else:
                yield Damage(f"{path} is damaged at byte {position}: the rest of it is not read")
            return
        offset, size = position + 12, int.from_bytes(frame[:8], "little")
        position = offset + size + 4
        if position > end:
            yield Damage(
                f"{path} is cut off at byte {end}, inside the record at byte {offset - 12}: the rest of it is missing"
            )
            return
        yield _checked_record(file, offset, size)


def _checked_record(file: IO[bytes], offset: int, size: int) -> _Record:
    """Read the data of a record and its checksum; a record that is too large is not kept in memory."""
    if size <= _MAX_RECORD:
        data = file.read(size)
        crc, problem = google_crc32c.value(data), ""
    else:
        data, crc, problem = b"", 0, "record above 512 MiB"
        for start in range(0, size, _CHUNK):
            crc = google_crc32c.extend(crc, file.read(min(_CHUNK, size - start)))
    if file.read(4) != struct.pack("<I", _mask(crc)):
        problem = "record damaged (its checksum differs)"
    return _Record(offset, size, data, problem)


def _masked_crc(data: bytes) -> int:
    return _mask(google_crc32c.value(data))


def _mask(crc: int) -> int:
    """Mask a CRC as TensorFlow does: rotate it right by 15 bits and add a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _columns(path: str, options: Columns, values: dict[str, Any]) -> Columns:
    names, typed = list(values), _typed_features(path)
    image = options.image or guess_column(typed.get("Image", []), names)
    label = options.label
    if not label and "label" not in options.declined:
        label = guess_column(typed.get("ClassLabel", []), names)
    return choose_columns(replace(options, image=image, label=label), names, path)


def _typed_features(path: str) -> dict[str, list[str]]:
    """Return the names in TFDS's features.json, lower-case, by type: "Image", ..."""
    found: dict[str, list[str]] = {}
    try:
        value = json.loads(read_text(join(parent(path), "features.json")) or "{}")
        for feature, description in value["featuresDict"]["features"].items():
            kind = str(description["pythonClassName"]).rpartition(".")[2]
            found.setdefault(kind, []).append(feature.lower())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return found
    return found


def _expected_records(path: str) -> int | None:
    """Return the number of records of a file by TFDS's dataset_info.json, None if it does not say."""
    match = re.search(r"(\w+)\.(array_record|tfrecord)-(\d+)-of-(\d+)$", name(path))
    try:
        value = json.loads(read_text(join(parent(path), "dataset_info.json")) or "{}")
        for split in value.get("splits", ()) if match else ():
            lengths = split["shardLengths"]
            if match and split["name"] == match[1] and len(lengths) == int(match[4]):
                return int(lengths[int(match[3])])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    return None
