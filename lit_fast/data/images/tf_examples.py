"""Parses `tf.train.Example`, the protocol buffer in which TensorFlow Datasets stores a row.

    message Example   { Features features = 1; }
    message Features  { map<string, Feature> feature = 1; }
    message Feature   { oneof { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; } }

each list with one repeated field `value = 1` (tensorflow/core/example/example.proto, feature.proto). Wire
format: protobuf.dev, "Encoding". Floats are passed over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from array_record.python.array_record_module import ArrayRecordReader

from lit_fast.data.dataset import Source
from lit_fast.data.images.decode import ImageError
from lit_fast.errors import UserError
from lit_fast.storage import remote

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class ExampleError(ValueError):
    """Bytes that are no Example; the message says why."""


def parse_example(record: bytes) -> dict[str, list[bytes] | list[int]]:
    """Name -> values of every feature of bytes or integers; of floats and empty ones, [].

    Raises:
      ExampleError: the record is something else, or its lengths lie.
    """
    features: dict[str, list[bytes] | list[int]] = {}
    for number, wire, value in _fields(memoryview(record)):
        if number == 1 and wire == _BYTES:
            for inner, kind, entry in _fields(value):
                if inner == 1 and kind == _BYTES:
                    name, values = _entry(entry)
                    features[name] = values
    return features


def _entry(entry: memoryview) -> tuple[str, list[bytes] | list[int]]:
    name = ""
    values: list[bytes] | list[int] = []
    for number, wire, value in _fields(entry):
        if wire != _BYTES:
            continue
        if number == 1:
            name = bytes(value).decode("utf-8", "replace")
        elif number == 2:
            values = _feature(value)
    return name, values


def _feature(feature: memoryview) -> list[bytes] | list[int]:
    values: list[bytes] | list[int] = []
    for number, wire, value in _fields(feature):
        if wire == _BYTES and number == 1:
            values = [bytes(v) for n, w, v in _fields(value) if n == 1 and w == _BYTES]
        elif wire == _BYTES and number == 3:
            values = list(_integers(value))
    return values


def _integers(data: memoryview) -> Iterator[int]:
    """Packed, as every writer of today does, or one by one."""
    for number, wire, value in _fields(data):
        if number != 1:
            continue
        if wire == _VARINT:
            yield _signed(int.from_bytes(value, "little"))
        elif wire == _BYTES:
            place = 0
            while place < len(value):
                integer, place = _varint(value, place)
                yield _signed(integer)


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Field number, wire type and content (of a varint: 8 bytes little-endian)."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == _VARINT:
            integer, place = _varint(data, place)
            yield tag >> 3, wire, memoryview(integer.to_bytes(8, "little"))
            continue
        if wire == _BYTES:
            size, place = _varint(data, place)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ExampleError(f"wire type {wire}")
        if size > len(data) - place:
            raise ExampleError("a field is longer than the record")
        yield tag >> 3, wire, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data):
            raise ExampleError("the record ends within a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value & (1 << 64) - 1, place
        if shift >= 70:
            raise ExampleError("a number has more than ten bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


ERRORS = (ValueError, RuntimeError, IndexError, OverflowError, MemoryError)


def open_records(path: str) -> ArrayRecordReader:
    """A reader for records in any order.

    Raises:
      UserError: the file is remote.
      ValueError, RuntimeError: it is no array_record file.
    """
    if remote.is_remote(path):
        raise UserError(f"{path}: array_record files are read from a local disk only; copy it first")
    return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")


class _Records:
    """An array_record file of Examples; its reader takes one thread at a time."""

    def __init__(self, path: str) -> None:
        from lit_fast.data.images.tf_examples import ERRORS, open_records

        self._lock = threading.Lock()
        try:
            self._reader = open_records(path)
        except ERRORS as error:
            raise UserError(f"{path} is damaged: {error}; restore it") from None

    def image(self, source: Source, number: int) -> bytes:
        from lit_fast.data.images.tf_examples import ERRORS, ExampleError, parse_example

        try:
            with self._lock:
                record = bytes(self._reader.read(number, number + 1)[0])
            found = parse_example(record).get(source.image)
        except ExampleError as error:
            raise ImageError(f"not a tf.train.Example ({error})") from None
        except ERRORS as error:
            raise UserError(f"{source.path} is damaged at record {number}: {error}; restore it") from None
        if not found or not isinstance(found[0], bytes):
            raise ImageError(f"no image in {source.image}")
        return found[0]
