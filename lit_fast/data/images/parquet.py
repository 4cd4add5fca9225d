"""Images in parquet files, by row group and row."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_fast.data.dataset import Source
from lit_fast.data.images.decode import ImageError
from lit_fast.errors import UserError

MAX_ROW_GROUP = 4 << 30  # decoded bytes, as the file says; a row group is read as a whole

# What pyarrow raises for damaged files.
ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)


def check_row_group(path: str, parquet: pq.ParquetFile, group: int) -> None:
    """Refuse row groups that no memory holds.

    The sizes of single columns are not asked for: in a damaged file pyarrow ends the process over them.

    Raises:
      UserError: a row group has more than 4 GiB.
    """
    size = parquet.metadata.row_group(group).total_byte_size
    if size > MAX_ROW_GROUP:
        raise UserError(
            f"{path} has {size} bytes in row group {group}, which is read as a whole; write it anew with smaller "
            f"row groups"
        )


_CACHE_BYTES = 1 << 30  # decoded row groups; the one in use may be larger


class _RowGroups:
    """Decoded row groups of parquet files: each is read by one thread while others wait for it."""

    def __init__(self) -> None:
        self._columns: OrderedDict[tuple[str, int], _RowGroup] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, source: Source, group: int, row: int) -> bytes:
        place = (source.path, group)
        with self._lock:
            entry = self._columns.setdefault(place, _RowGroup())
            self._columns.move_to_end(place)
        with entry.lock:
            if entry.column is None:
                entry.column = _read_row_group(source, group)
                self._shrink()
            column = entry.column
        if row >= len(column):
            raise UserError(f"{source.path} has become shorter since it was indexed; restore it")
        value = column[row].as_py()
        if not value:
            raise ImageError("no image in the row")
        return bytes(value)

    def _shrink(self) -> None:
        with self._lock:
            held = {place: e.column.nbytes for place, e in self._columns.items() if e.column is not None}
            total = sum(held.values())
            for place, size in list(held.items())[:-1]:
                if total <= _CACHE_BYTES:
                    break
                del self._columns[place]
                total -= size


class _RowGroup:
    """An entry of the cache; `lock` is held while the column is read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.column: Any = None  # pyarrow.ChunkedArray of bytes


def _read_row_group(source: Source, group: int) -> Any:
    import pyarrow.parquet as pq

    from lit_fast.data.images.parquet import ERRORS, check_row_group
    from lit_fast.storage.read import open_binary

    with open_binary(source.path) as file:
        try:
            parquet = pq.ParquetFile(file)
            check_row_group(source.path, parquet, group)
            column = parquet.read_row_group(group, columns=[source.image], use_threads=False).column(0)
            if source.image not in parquet.schema_arrow.names:  # a field of a struct
                import pyarrow.compute as pc

                column = pc.struct_field(column, 0)
            return column
        except ERRORS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{source.path} is damaged in row group {group} ({reason}); restore it") from None
