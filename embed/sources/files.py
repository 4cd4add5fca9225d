"""Opening the files of a source, local or remote, and the small text files beside them."""

from __future__ import annotations

import os
import posixpath
import stat as modes
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from embed import remote
from embed.sources.noise import is_noise
from lit_fast.errors import UserError


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
