"""The image files of a dataset by row, wherever its sources are, from any thread."""

from __future__ import annotations

import os
import stat as modes
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any
from urllib.parse import quote

from lit_fast.data.dataset import BLOCK, Block, Dataset, Source, decode_block
from lit_fast.data.images.decode import MAX_IMAGE, ImageError
from lit_fast.data.images.noise import SIDE, is_noise, noise_image
from lit_fast.data.images.parquet import _RowGroups
from lit_fast.data.images.tf_examples import _Records
from lit_fast.errors import UserError
from lit_fast.storage import remote


def size_and_etag(path: str) -> tuple[int, str]:
    """Bytes and ETag ("" for local files) of a file; 0 bytes for a directory and for noise.

    Raises:
      UserError: it cannot be read.
    """
    if is_noise(path):
        return 0, ""
    if remote.is_remote(path):
        return remote.stat(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if modes.S_ISDIR(status.st_mode):
        return 0, ""
    if not modes.S_ISREG(status.st_mode):  # a pipe could be read only once, and not by place
        raise UserError(f"{path} is not a regular file; write what it gives to a file first")
    return status.st_size, ""


_OPEN_FILES = 256


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


# The image files of a dataset's rows, for pages that show them.
#
# How sources are read is the business of the first stage; its function is found through an entry point of the group
# `lit_fast.data.images.reader`, as commands are, so that the ground floor never has to import a stage.


ReadPicture = Callable[[int], bytes | None]
"""A row to its image file as it lies in the source; None where it cannot be had."""


# The image files of a dataset for pages: shown where they can be had, never a reason to stop.


def picture_reader(dataset: Dataset) -> ReadPicture:
    """A function of a row to its image file; None if its source is missing or another than was indexed."""
    fetcher = Fetcher(dataset)

    @cache  # of a source that does not answer, each picture would wait for it again
    def usable(source: int) -> bool:
        try:
            check_source(dataset.sources[source], dataset)
            return True
        except (UserError, IndexError):  # rows that were imported without images have no source
            return False

    def read(row: int) -> bytes | None:
        block, i = fetcher.place(row)
        if not usable(block.sources[i]):
            return None
        try:
            return fetcher.bytes(row)
        except (ImageError, UserError):
            return None

    return read
