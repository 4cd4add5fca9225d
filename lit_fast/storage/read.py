"""Opening the files of a source, local or remote, and the small text files beside them."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from lit_fast.errors import UserError
from lit_fast.storage import remote


def open_binary(path: str) -> IO[bytes]:
    """A seekable file.

    Raises:
      UserError: it cannot be opened.
    """
    if remote.is_remote(path):
        return remote.open_remote(path)  # type: ignore[return-value]
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def folder(path: str) -> str:
    """The directory of a local path or URL."""
    if remote.is_remote(path):
        return posixpath.dirname(path.partition("?")[0])
    return os.path.dirname(path)


def name(path: str) -> str:
    """The last part of a local path or URL."""
    return posixpath.basename((path.partition("?")[0] if remote.is_remote(path) else path).rstrip("/"))


def beside(directory: str, file: str, limit: int = 16 << 20) -> str | None:
    """The text of a file in a directory; None if there is none.

    Raises:
      UserError: it is not UTF-8, or has more than `limit` bytes.
    """
    if not directory:  # of a source that is no file
        return None
    path = posixpath.join(directory, file)
    if remote.is_remote(path):
        if not urlsplit(directory).netloc:
            return None
        data = remote.read_whole(path, limit)
    else:
        data = _local(Path(path), limit)
    try:
        return None if data is None else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _local(path: Path, limit: int) -> bytes | None:
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path} has more than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
