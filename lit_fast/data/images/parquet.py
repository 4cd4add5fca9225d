"""Images in a column of a parquet file, by row group and row."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lit_fast.data.dataset import Source
from lit_fast.data.images.decode import ImageError
from lit_fast.data.images.sources import check_source
from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import open_read

MAX_ROW_GROUP = 4 << 30  # decoded bytes according to the file; a row group is read as a whole
CACHED_BYTES = 1 << 30  # of decoded row groups; the one in use may be larger

# The exceptions of pyarrow for damaged files.
ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)


def check_row_group(path: str, parquet: pq.ParquetFile, group: int) -> None:
    """Refuse a row group that does not fit in memory.

    The sizes of single columns are not read: in a damaged file pyarrow ends the process over them.

    Raises:
      UserError: the row group has more than 4 GiB.
    """
    size = parquet.metadata.row_group(group).total_byte_size
    if size > MAX_ROW_GROUP:
        raise UserError(
            f"{path} has {size} bytes in row group {group}, which is read as a whole; write the file with smaller "
            f"row groups"
        )


class ParquetImages:
    """Reads images from the parquet files of a dataset, with a cache of decoded row groups.

    A row group is read by one thread while the others that need it wait. Since its rows have no checksums, the file
    is checked before and after each row group.
    """

    def __init__(self, dataset: str, cached_bytes: int = CACHED_BYTES) -> None:
        self._dataset, self._cached_bytes = dataset, cached_bytes
        self._row_groups: OrderedDict[tuple[str, int], _RowGroup] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, source: Source, *, group: int, row: int) -> bytes:
        """Return the image in `row` of a row group.

        Raises:
          UserError: the file is damaged or has changed since it was indexed.
          ImageError: the row has no image.
        """
        key = (source.path, group)
        with self._lock:
            entry = self._row_groups.setdefault(key, _RowGroup())
            self._row_groups.move_to_end(key)
        with entry.lock:
            if entry.column is None:
                check_source(source, self._dataset)
                entry.column = _read_column(source, group)
                check_source(source, self._dataset)
                self._evict()
            column = entry.column
        if row >= len(column):
            raise UserError(f"{source.path} is shorter than when it was indexed; restore it")
        value = column[row].as_py()
        if not value:
            raise ImageError("no image in the row")
        return bytes(value)

    def _evict(self) -> None:
        """Drop the least recently used row groups beyond the limit, except the last one."""
        with self._lock:
            sizes = {key: e.column.nbytes for key, e in self._row_groups.items() if e.column is not None}
            total = sum(sizes.values())
            for key, size in list(sizes.items())[:-1]:
                if total <= self._cached_bytes:
                    break
                del self._row_groups[key]
                total -= size


class _RowGroup:
    """An entry of the cache; `lock` is held while the column is read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.column: Any = None  # pyarrow.ChunkedArray of bytes


def _read_column(source: Source, group: int) -> Any:
    with open_read(source.path) as file:
        try:
            parquet = pq.ParquetFile(file)
            check_row_group(source.path, parquet, group)
            column = parquet.read_row_group(group, columns=[source.image], use_threads=False).column(0)
            while pa.types.is_struct(column.type):  # it has the field that was read alone
                column = pc.struct_field(column, 0)
            return column
        except ERRORS as error:
            raise UserError(
                f"{source.path} is damaged in row group {group} ({first_line(error)}); restore it"
            ) from None
