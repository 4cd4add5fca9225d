"""Find a parquet file that another one follows, as `cat a.parquet b.parquet` makes it.

Positions in a parquet file count from its start, so that of two files in one the footer of the second finds the data of
the first. The footer is parsed here, in thrift's compact protocol (apache/parquet-format, parquet.thrift), since
pyarrow ends the process over the positions of columns in a damaged file.
"""

from __future__ import annotations

import os
from typing import IO, Any

_MAGIC = b"PAR1"
_MAX_FOOTER = 16 << 20  # bytes; larger ones are not parsed
_CHUNK = 1 << 20  # bytes
_MAX_DEPTH = 20  # of structs and lists


def find_second_file(file: IO[bytes]) -> int:
    """Return where a second parquet file begins; 0 if there is none, or if the footer is damaged.

    The file is searched only if there are bytes between the columns and indexes that the footer names and itself.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < length <= min(size - 12, _MAX_FOOTER):
        return 0
    file.seek(size - 8 - length)
    try:
        metadata, _ = _read_struct(file.read(length), 0, 0)
        end = max([4, *(_end_of(chunk) for group in metadata[4] for chunk in group[1])])
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, MemoryError):
        return 0
    return _find_boundary(file, size) if end + 2 * len(_MAGIC) <= size - 8 - length else 0


def _end_of(chunk: dict[int, Any]) -> int:
    """Return the end of a column chunk, its indexes and its bloom filter."""
    columns = chunk[3]
    first = min(p for p in (columns[9], columns.get(11, 0)) if p > 0)  # data page, dictionary page
    indexes = (
        chunk.get(4, 0) + chunk.get(5, 0),
        chunk.get(6, 0) + chunk.get(7, 0),
        columns.get(14, 0) + columns.get(15, 0),
    )
    return int(max(first + columns[7], *indexes))


def _find_boundary(file: IO[bytes], size: int) -> int:
    """Return the position after the last mark of a file which the first mark of another one follows; 0 if none."""
    overlap = 2 * len(_MAGIC) - 1
    for start in range(0, size, _CHUNK):
        file.seek(start)
        if (at := file.read(_CHUNK + overlap).find(_MAGIC * 2)) >= 0:
            return start + at + len(_MAGIC)
    return 0


def _read_struct(data: bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct by number, and the position behind it."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[position]:
        position += 1
        if head >> 4:
            number += head >> 4
        else:
            number, position = _read_number(data, position)
        if head & 15 in (1, 2):
            fields[number] = head & 15 == 1
        else:
            fields[number], position = _read_value(data, position, head & 15, depth)
    return fields, position + 1


def _read_value(data: bytes, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    match kind:
        case 1 | 2 | 3:  # a boolean in a list, or a byte
            return data[position], position + 1
        case 4 | 5 | 6:  # whole numbers
            return _read_number(data, position)
        case 7:  # a double
            return None, position + 8
        case 8:  # bytes
            length, position = _read_varint(data, position)
            return None, position + length
        case 9 | 10:  # a list or set
            head, position = data[position], position + 1
            count = head >> 4
            if count == 15:
                count, position = _read_varint(data, position)
            if count > len(data) - position:  # a value has at least a byte
                raise ValueError(f"a list of {count} values")
            values = []
            for _ in range(count):
                value, position = _read_value(data, position, head & 15, depth + 1)
                values.append(value)
            return values, position
        case 12:
            return _read_struct(data, position, depth + 1)
    raise ValueError(f"type {kind}")


def _read_number(data: bytes, position: int) -> tuple[int, int]:
    value, position = _read_varint(data, position)
    return value >> 1 ^ -(value & 1), position


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[position]
        value, position, shift = value | (byte & 127) << shift, position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("number too long")
