"""The journal of an unfinished shard: an append-only file of finished batches.

A record is a fixed header (magic, first row in the shard, rows, bytes of the features, bytes of the JSON,
CRC-32 of all that and of the payload) and a payload (bfloat16 features, then the invalid rows as JSON).
The first record has no rows; its JSON identifies the work that the journal belongs to. After a kill, the records
before the first incomplete one are kept.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lit_fast.data.features import BFLOAT16
from lit_fast.storage.atomic import sync
from lit_fast.storage.files import make_directory, open_append, remove
from lit_fast.storage.paths import StrPath, parent

_HEADER = struct.Struct("<4sIIIII")
_MAGIC = b"LFJ1"
_SYNC_SECONDS = 2.0  # work that a power cut may cost; a kill costs the batches in flight only


class Journal:
    """The known features of one shard, in memory and in the journal.

    Attributes:
      features: bfloat16 `[rows, width]`.
      invalid: row in the shard -> reason.
      done: number of known rows, from the shard's first on.
      discarded: whether there was a journal of other work.
    """

    def __init__(self, path: StrPath, rows: int, width: int, identity: dict[str, Any]) -> None:
        """Open the journal and read its records; those of other work are deleted.

        The process holds the lock of the shard.
        """
        self.path = os.fspath(path)
        self.features = np.zeros((rows, width), BFLOAT16)
        self.invalid: dict[int, str] = {}
        self.done = 0
        self.discarded = False
        make_directory(parent(path))
        self._identity = identity
        self._file = open_append(path)
        end = self._recover()
        self._file.truncate(end)
        self._file.seek(end)
        self._synced = time.monotonic()
        if end == 0:
            self._write(_record(0, 0, b"", identity))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def append(self, features: np.ndarray, invalid: dict[int, str]) -> None:
        """Append the next rows.

        Args:
          features: bfloat16 `[n, width]`.
          invalid: row in the shard -> reason.
        """
        self._keep(features, invalid)
        value = {str(row): reason for row, reason in invalid.items()}
        self._write(_record(self.done - len(features), len(features), features.tobytes(), value))
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            sync(self._file)
            self._synced = time.monotonic()

    def add_missing(self, data: bytes) -> int:
        """Append the rows of another journal of the same work that this one lacks.

        Args:
          data: the content of its file, which may end anywhere.

        Returns:
          The number of new rows.
        """
        before = self.done
        for start, features, invalid, _ in self._own_records(data):
            known = self.done - start
            if 0 <= known < len(features):
                self.append(features[known:], {r: why for r, why in invalid.items() if r >= self.done})
        return self.done - before

    def remove(self) -> None:
        """Delete the file and close it."""
        remove(self.path)
        self.close()

    def _keep(self, features: np.ndarray, invalid: dict[int, str]) -> None:
        self.features[self.done : self.done + len(features)] = features
        self.invalid |= invalid
        self.done += len(features)

    def _write(self, record: bytes) -> None:
        view = memoryview(record)
        while view:
            view = view[self._file.write(view) :]

    def _recover(self) -> int:
        """Read all complete records.

        Returns:
          The position of their end, 0 if they belong to other work.
        """
        self._file.seek(0)
        data, end = self._file.read(), 0
        for start, features, invalid, record_end in self._own_records(data):
            if start != self.done:
                break
            self._keep(features, invalid)
            end = record_end
        self.discarded = end == 0 and next(_records(data), None) is not None
        return end

    def _own_records(self, data: bytes) -> Iterator[tuple[int, np.ndarray, dict[int, str], int]]:
        """Yield (first row, features, invalid rows, position of its end) of the records before the first damaged one.

        The first one has no rows. A journal of other work has none.
        """
        records, (total, width) = _records(data), self.features.shape
        first = next(records, None)
        if first is None or first[:-1] != (0, 0, b"", self._identity):
            return
        yield 0, np.zeros((0, width), BFLOAT16), {}, first[-1]
        for start, rows, features, invalid, end in records:
            if start + rows > total or len(features) != rows * width * 2:
                return
            reasons = {int(row): str(reason) for row, reason in invalid.items() if row.isdecimal()}
            if any(not start <= row < start + rows for row in reasons):
                return
            yield start, np.frombuffer(features, BFLOAT16).reshape(rows, width), reasons, end


def _records(data: bytes) -> Iterator[tuple[int, int, bytes, dict[str, Any], int]]:
    """Yield (first row, rows, features, JSON, position of its end) of the records before the first damaged one."""
    end = 0
    while end + _HEADER.size <= len(data):
        begin, end = end, end + _HEADER.size
        magic, start, rows, data_bytes, json_bytes, crc = _HEADER.unpack(data[begin:end])
        features, text = data[end : end + data_bytes], data[end + data_bytes : end + data_bytes + json_bytes]
        end += data_bytes + json_bytes
        if magic != _MAGIC or end > len(data):
            return
        if crc != zlib.crc32(text, zlib.crc32(features, zlib.crc32(data[begin : begin + _HEADER.size - 4]))):
            return
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(value, dict):
            return
        yield start, rows, features, value, end


def _record(start: int, rows: int, data: bytes, value: dict[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True).encode()
    head = _HEADER.pack(_MAGIC, start, rows, len(data), len(text), 0)[:-4]
    checksum = zlib.crc32(text, zlib.crc32(data, zlib.crc32(head)))
    return head + checksum.to_bytes(4, "little") + data + text
