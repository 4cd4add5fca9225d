"""The image files of a dataset by row, wherever its sources are, from any thread."""

from __future__ import annotations

import os
import stat as modes
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from embed import remote
from embed.sources.files import size_and_etag
from embed.sources.items import MAX_IMAGE
from embed.sources.noise import SIDE, noise_image
from lit_fast.dataset import BLOCK, Block, Dataset, Source, decode_block
from lit_fast.errors import UserError
from lit_fast.preprocess import ImageError

_OPEN_FILES = 256
_CACHE_BYTES = 1 << 30  # decoded row groups; the one in use may be larger


class Fetcher:
    """Reads the images of a dataset; noise has `side` x `side` pixels."""

    def __init__(self, dataset: Dataset, side: int = SIDE) -> None:
        self._dataset, self._side = dataset, side
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._row_groups = _RowGroups()
        reader = dataset.index_reader()
        self._block = lru_cache(maxsize=8)(lambda number: decode_block(reader.read(number)))

    def place(self, row: int) -> tuple[Block, int]:
        """The index block of a row and the row's number in it."""
        return self._block(row // BLOCK), row % BLOCK

    def bytes(self, row: int) -> bytes:
        """The image file of a row.

        Raises:
          UserError: its source cannot be read or has changed.
          ImageError: only this image cannot be read.
        """
        block, i = self.place(row)
        number, offset, size = block.sources[i], block.offsets[i], block.sizes[i]
        source = self._dataset.sources[number]
        try:
            match source.kind:
                case "tar" if remote.is_remote(source.path):
                    return remote.read_range(source.path, offset, size)
                case "tar":
                    return _part(self._opened(number, _Descriptor), source.path, offset, size)
                case "parquet":
                    return self._row_groups.image(source, offset, size)
                case "array_record":
                    return self._opened(number, _Records).image(source, offset)
                case "folder":
                    return _file(source, block.keys[i])
                case "features":
                    raise UserError(f"{self._dataset.path} was imported as features, without images")
                case "noise":
                    return noise_image(offset, self._side)
        except OSError as error:
            raise UserError(
                f"{error.filename or source.path} cannot be read: {error.strerror or error}; restore it and run "
                "this again"
            ) from None
        raise UserError(f"{self._dataset.path} has a source of kind {source.kind}, made by a later version")

    def _opened(self, number: int, kind: Callable[[str], Any]) -> Any:
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = kind(self._dataset.sources[number].path)
                if len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return file


def check_sources(dataset: Dataset) -> None:
    """Refuse a dataset of which a source is missing or has changed; no row is looked at.

    Raises:
      UserError: names the source.
    """
    # Remote ones are asked for one by one, hence the threads.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda source: check_source(source, dataset), dataset.sources))


def check_source(source: Source, dataset: Dataset) -> None:
    """Raises UserError if a source of the dataset is missing or has changed, or never had images."""
    if source.kind == "features":
        raise UserError(
            f"{dataset.path} was imported as features, without images; to embed them, index the images as a dataset"
        )
    try:
        found, etag = size_and_etag(source.path)
    except UserError as error:
        raise UserError(f"source {source.path} of {dataset.path}: {error}; restore it there") from None
    if found != source.bytes:
        raise UserError(
            f"source {source.path} has {found} bytes, but had {source.bytes} when it was indexed; restore it"
        )
    if etag != source.etag:
        raise UserError(
            f"source {source.path} is another file than when it was indexed (its ETag changed); restore it"
        )
    if source.images and not remote.is_remote(source.images) and not os.path.isdir(source.images):
        raise UserError(f"{source.images}, the images of {source.path}, is missing; restore it there")


class _Descriptor:
    """An open file that closes itself when the last thread that reads from it lets go."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone at exit
        if self.number >= 0:
            close(self.number)


def _part(file: _Descriptor, path: str, offset: int, left: int) -> bytes:
    parts = []
    while left > 0:
        part = os.pread(file.number, left, offset)
        if not part:
            raise UserError(f"{path} has become shorter since it was indexed; restore it")
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    return b"".join(parts)


def _file(source: Source, key: str) -> bytes:
    """One file of a folder. It alone may be missing; the folder must be there."""
    if remote.is_remote(source.images):
        name = quote(key) if source.images.startswith("http") else key
        data = remote.read_whole(f"{source.images}/{name}", MAX_IMAGE)
        if data is None:
            raise ImageError("image file not found")
        return data
    path = os.path.join(source.images, key)
    try:
        # Without O_NONBLOCK a pipe in the place of an image would hang.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.isdir(source.images):
            raise UserError(
                f"{source.images}, the images of {source.path}, is missing; restore it there"
            ) from None
        raise ImageError("image file not found") from None
    try:
        status = os.fstat(number)
        if not modes.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size > MAX_IMAGE:
            raise ImageError("image file above 256 MiB")
        with open(number, "rb", closefd=False) as file:
            return file.read(MAX_IMAGE)
    finally:
        os.close(number)


class _Records:
    """An array_record file of Examples; its reader takes one thread at a time."""

    def __init__(self, path: str) -> None:
        from embed.sources.records import ERRORS, open_records

        self._lock = threading.Lock()
        try:
            self._reader = open_records(path)
        except ERRORS as error:
            raise UserError(f"{path} is damaged: {error}; restore it") from None

    def image(self, source: Source, number: int) -> bytes:
        from embed.sources.examples import ExampleError, parse_example
        from embed.sources.records import ERRORS

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

    from embed.sources.files import open_binary
    from embed.sources.parquet import ERRORS, check_row_group

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
