"""Lists of byte records, one per block of rows, in array_record files.

Record `b` belongs to block `b`. A file holds up to 4096 records, because the time to look a record up in array_record
grows with the size of the file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lit_fast.errors import UserError
from lit_fast.storage.atomic import link_or_copy, remove_temporary_files, replacing
from lit_fast.storage.cache import local_copy
from lit_fast.storage.files import list_names, make_directory, remove
from lit_fast.storage.machine import cached_files
from lit_fast.storage.paths import StrPath, join

FILE_RECORDS = 4096


def _record_file(directory: StrPath, number: int) -> str:
    return join(directory, f"{number:05d}.array_record")


class RecordWriter:
    """Appends records to a directory, after deleting the array_record files in it.

    With `after`, another directory, its first `count` records come first: full files are linked, only the last one
    is copied record by record.

    Raises:
      UserError: a file cannot be written; from any method.
    """

    def __init__(self, directory: StrPath, *, after: StrPath | None = None, count: int = 0) -> None:
        make_directory(directory)
        for name in list_names(directory):
            if name.endswith(".array_record"):
                remove(join(directory, name))
        remove_temporary_files(directory)
        self._directory, self._count = directory, 0
        self._writer: ArrayRecordWriter | None = None
        self._file = ExitStack()  # the file that is being written
        if after is None:
            return
        for number in range(count // FILE_RECORDS):
            source = _record_file(after, number)
            try:
                link_or_copy(source, _record_file(directory, number))
            except FileNotFoundError:
                raise UserError(f"{source} is missing; restore it or make the dataset again") from None
        self._count = count // FILE_RECORDS * FILE_RECORDS
        reader = RecordReader(after, count)
        for number in range(self._count, count):
            self.write(reader.read(number))

    def write(self, record: bytes) -> None:
        """Append one record."""
        if self._count % FILE_RECORDS == 0:
            self.close()
        path = _record_file(self._directory, self._count // FILE_RECORDS)
        with _write_errors(path):
            if self._writer is None:
                self._writer = ArrayRecordWriter(
                    self._file.enter_context(replacing(path)), "group_size:1,zstd"
                )
            self._writer.write(record)
        self._count += 1

    def close(self) -> None:
        """Finish the current file: flush it to disk, or upload it to its bucket."""
        if self._writer is None:
            return
        path = _record_file(self._directory, (self._count - 1) // FILE_RECORDS)
        with _write_errors(path):
            self._writer.close()
        self._writer = None
        self._file.close()


@contextmanager
def _write_errors(path: str) -> Iterator[None]:
    """Raise the writer's errors, a full disk for example, as `UserError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"{path} cannot be written: {reason}; fix the cause, then rerun the same command"
        ) from None


class RecordReader:
    """Random access to the `count` records of a directory, from any thread; keeps the last used files open."""

    def __init__(self, directory: StrPath, count: int) -> None:
        self._directory, self._count = directory, count
        self._open = lru_cache(maxsize=cached_files())(_open_records)
        self._lock = threading.Lock()

    def read(self, number: int) -> bytes:
        """Return record `number`.

        Raises:
          UserError: the file is missing or damaged.
        """
        if not 0 <= number < self._count:
            raise IndexError(number)
        file, record = divmod(number, FILE_RECORDS)
        path = _record_file(self._directory, file)
        try:
            with self._lock:
                return bytes(self._open(path).read(record, record + 1)[0])
        except FileNotFoundError:
            raise UserError(f"{path} is missing; restore it or make the dataset again") from None
        except (ValueError, RuntimeError, IndexError) as error:
            raise UserError(
                f"{path} is damaged at record {record}: {error}; restore it or make the dataset again"
            ) from None


def _open_records(path: str) -> ArrayRecordReader:
    return ArrayRecordReader(local_copy(path))
