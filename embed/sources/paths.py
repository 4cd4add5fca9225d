"""Image files that a table names: their paths within the directory of images.

A path is judged by its text: normalised, it must lie inside. Links in the directory are the owner's own and
are followed.
"""

from __future__ import annotations

import os
import posixpath
import stat as modes

from lit_fast.data.images.decode import MAX_IMAGE
from lit_fast.embed.sources.items import is_text
from lit_fast.errors import UserError
from lit_fast.storage import remote
from lit_fast.storage.read import folder


def image_directory(images: str, table: str) -> str:
    """What the paths in `table` are relative to: `images` if given, else where the table lies.

    Raises:
      UserError: there is no such directory.
    """
    directory = images or folder(table)
    if remote.is_remote(directory):
        return directory.rstrip("/")
    directory = os.path.abspath(directory)
    if not os.path.isdir(directory):
        raise UserError(
            f"--images {directory} is not a directory; give the one that the paths in {table} start from"
        )
    return directory


def inside(directory: str, path: object) -> tuple[str, str]:
    """A path relative to the directory of images, normalised, and what is wrong with it."""
    if isinstance(path, list) and len(path) == 1:
        path = path[0]
    if isinstance(path, bytes):
        path = path.decode("utf-8", "surrogateescape")
    if not isinstance(path, str) or not path.strip() or len(path) > 4096:
        return "", "no path of an image"
    if not is_text(path) or "\0" in path:
        return path, "path is not UTF-8 text"
    if remote.is_remote(path) or path.startswith("/"):
        start = directory.rstrip("/") + "/"
        if not path.startswith(start):
            return path, f"path outside {directory}"
        path = path[len(start) :]
    inner = posixpath.normpath(path)
    if inner.startswith(("../", "/")) or inner in (".", ".."):
        return path, f"path outside {directory}"
    return inner, ""


def file_size(directory: str, inner: str) -> tuple[int, str]:
    """Bytes of an image file (0 = remote, not asked) and why it cannot be used."""
    if remote.is_remote(directory):
        return 0, ""
    try:
        status = os.stat(os.path.join(directory, inner))
    except OSError:
        return 0, f"image file not found in {directory}"
    if not modes.S_ISREG(status.st_mode):
        return 0, "not a regular file"
    if status.st_size == 0:
        return 0, "empty image file"
    return status.st_size, "image file above 256 MiB" if status.st_size > MAX_IMAGE else ""
