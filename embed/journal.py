"""The journal of an unfinished shard: an append-only file of finished batches.

A record is a fixed header (magic, first row in the shard, rows, bytes of the features, bytes of the JSON,
CRC-32 of all that and of the payload) and a payload (bfloat16 features, then the invalid rows as JSON).
The first record has no rows and says what the journal belongs to. After a kill everything up to the first
record that is not whole is kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lit_fast.data.features import BFLOAT16
from lit_fast.errors import UserError

_HEADER = struct.Struct("<4sIIIII")
_MAGIC = b"LFJ1"
_SYNC_SECONDS = 2.0  # work that a power cut may cost; a kill costs the batches in flight only


class Journal:
    """One shard's features as far as they are known, in memory and in the journal.

    Attributes:
      features: bfloat16 `[rows, width]`.
      invalid: row in the shard -> reason.
      done: rows known, from the shard's first on.
      discarded: there was a journal that belonged to something else.
    """

    def __init__(self, path: Path, rows: int, width: int, belongs: dict[str, Any]) -> None:
        """Open the journal and read what an earlier process left; one of something else is emptied.

        Raises:
          UserError: another process is at work on this shard.
        """
        self.path = path
        self.features = np.zeros((rows, width), BFLOAT16)
        self.invalid: dict[int, str] = {}
        self.done = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.discarded = False
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed by __exit__)
        if not _lock(self._file):
            self._file.close()
            raise UserError(f"{path}: another process is embedding this shard; wait for it or stop it")
        end = self._recover(belongs)
        self._file.truncate(end)
        self._file.seek(end)
        self._synced = time.monotonic()
        if end == 0:
            self._write(_record(0, 0, b"", belongs))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, features: np.ndarray, invalid: dict[int, str]) -> None:
        """Add the next rows: bfloat16 `[n, width]`, and row in the shard -> reason."""
        self._keep(features, invalid)
        stored = {str(row): why for row, why in invalid.items()}
        self._write(_record(self.done - len(features), len(features), features.tobytes(), stored))
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the shard is safe elsewhere."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _keep(self, features: np.ndarray, invalid: dict[int, str]) -> None:
        self.features[self.done : self.done + len(features)] = features
        self.invalid |= invalid
        self.done += len(features)

    def _write(self, record: bytes) -> None:
        view = memoryview(record)
        while view:
            view = view[self._file.write(view) :]

    def _recover(self, belongs: dict[str, Any]) -> int:
        """Read all whole records; where they end, 0 if the journal belongs to something else."""
        self._file.seek(0)
        first = self._next()
        if first is None or first[1:] != (0, b"", belongs):
            self.discarded = first is not None
            return 0
        end, width = self._file.tell(), self.features.shape[1]
        while (record := self._next()) is not None:
            start, rows, data, invalid = record
            if start != self.done or start + rows > len(self.features) or len(data) != rows * width * 2:
                break
            self._keep(
                np.frombuffer(data, BFLOAT16).reshape(rows, width), {int(r): w for r, w in invalid.items()}
            )
            end = self._file.tell()
        return end

    def _next(self) -> tuple[int, int, bytes, dict[str, Any]] | None:
        head = _read(self._file, _HEADER.size)
        if len(head) < _HEADER.size:
            return None
        magic, start, rows, data_bytes, json_bytes, crc = _HEADER.unpack(head)
        if magic != _MAGIC or data_bytes > self.features.nbytes or json_bytes > 1 << 28:
            return None
        payload = _read(self._file, data_bytes + json_bytes)
        if len(payload) < data_bytes + json_bytes or crc != _checksum(head, payload):
            return None
        return start, rows, payload[:data_bytes], json.loads(payload[data_bytes:])


def _lock(file: Any) -> bool:
    """Whether the file is ours now; tried for a second, since others may look whether it is locked."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


def _record(start: int, rows: int, data: bytes, value: dict[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True).encode()
    payload = data + text
    head = _HEADER.pack(_MAGIC, start, rows, len(data), len(text), 0)
    return _HEADER.pack(_MAGIC, start, rows, len(data), len(text), _checksum(head, payload)) + payload


def _checksum(head: bytes, payload: bytes) -> int:
    """CRC-32 of a record without its last header field, which is the checksum itself."""
    return zlib.crc32(payload, zlib.crc32(head[:-4]))


def _read(file: Any, count: int) -> bytes:
    """Up to `count` bytes; fewer only at the end of the file."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
