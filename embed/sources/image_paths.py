"""Paths of image files in a table: relative to one directory and inside it.

Only the text of a path is checked: normalized, it must be inside the directory. Symbolic links in the directory are
followed.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

from lit_fast.data.images.decode import MAX_IMAGE
from lit_fast.data.images.fingerprint import HEAD, image_checksum
from lit_fast.embed.sources.columns import ParsedRow
from lit_fast.embed.sources.interface import JUNK, Columns, Sample, Skipped, is_utf8
from lit_fast.errors import UserError, is_shortage
from lit_fast.storage.files import exists, file_status, is_directory, list_directories, read_range
from lit_fast.storage.paths import is_junk, is_url, join, parent, suffix

NOT_FOUND = "image file not found in "  # beginning of the reason

_MAX_FOLDERS = 1000
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def image_directory(options: Columns, table: str) -> str:
    """Return the directory of the paths in `table`: that of `options`, or else the table's own.

    Raises:
      UserError: there is no such directory, or `options` name a key.
    """
    if options.key:
        raise UserError(
            f"{table}: --key is not for tables of image files, where the path is the key; leave it out"
        )
    directory = options.images or parent(table)
    if is_url(directory):
        return directory.rstrip("/")
    directory = os.path.abspath(directory)
    if not is_directory(directory):
        raise UserError(
            f"--images {directory} is not a directory; give the one that the paths in {table} start from"
        )
    return directory


def clean_path(path: object) -> object:
    """Return a path as a table writes it, without spaces around it, `file://` and the backslashes of Windows."""
    path = path[0] if isinstance(path, list) and len(path) == 1 else path
    if not isinstance(path, str):
        return path
    path = path.strip()
    if path.lower().startswith("file://"):
        return "/" + unquote(path[len("file://") :]).removeprefix("localhost").lstrip("/")
    if "\\" in path and ("/" not in path or _DRIVE.match(path)):
        return path.replace("\\", "/")
    return path


def find_subdirectory(directory: str, path: object) -> str:
    """Return the one directory in `directory` that has the image at `path`; "" if it is found without, or in none."""
    inner, problem = _relative_path(directory, path)
    if problem or is_url(directory) or exists(join(directory, inner)):
        return ""
    try:
        folders = [join(directory, folder) for folder in list_directories(directory) if not is_junk(folder)]
    except OSError:
        return ""
    found = [folder for folder in folders[:_MAX_FOLDERS] if exists(join(folder, inner))]
    return found[0] if len(found) == 1 else ""


class ImageFile(NamedTuple):
    """An image file that a source names."""

    key: str  # path relative to the directory of images
    size: int = 0  # bytes; 0: unknown, as for remote files that were not listed
    check: int = 0  # checksum; 0: unknown, as for remote files
    problem: str = ""  # why it cannot be used; "": it can

    def item(self, row: ParsedRow, name: str = "") -> Sample | Skipped:
        """Return the row of this image; `name` names a skipped entry without a path."""
        return row.item(self.key, 0, self.size, self.problem, name, self.check)


def find_image(
    directory: str, path: object, default_suffix: str = "", sizes: Mapping[str, int] | None = None
) -> ImageFile:
    """Normalize a path in a table and look the file up; a local file is opened for its checksum.

    Args:
      directory: a local directory or a URL.
      path: what a table has.
      default_suffix: of a path without a suffix.
      sizes: bytes of the files below a URL, where they are known.
    """
    inner, problem = _relative_path(directory, path)
    if problem:
        return ImageFile(inner, problem=problem)
    if is_junk(inner):
        return ImageFile(inner, problem=JUNK)
    inner = inner if suffix(inner) else inner + default_suffix
    if is_url(directory):
        size = (sizes or {}).get(inner)
        return ImageFile(inner, size or 0, problem="" if size is None else _size_problem(size))
    location = join(directory, inner)
    try:
        status = file_status(location)  # before opening: a pipe would block
        if not status.is_file:
            return ImageFile(inner, problem="not a regular file")
        if problem := _size_problem(status.size):
            return ImageFile(inner, problem=problem)
        return ImageFile(inner, status.size, image_checksum(read_range(location, 0, HEAD)))
    except (FileNotFoundError, NotADirectoryError):
        if _DRIVE.match(inner):
            return ImageFile(inner, problem="path on a Windows drive; make it relative to --images")
        return ImageFile(inner, problem=f"{NOT_FOUND}{directory}")
    except OSError as error:
        if is_shortage(error):
            raise
        return ImageFile(inner, problem=f"image file cannot be read ({error.strerror})")


def _size_problem(size: int) -> str:
    return "" if 0 < size <= MAX_IMAGE else "image file above 256 MiB" if size else "empty image file"


def _relative_path(directory: str, path: object) -> tuple[str, str]:
    if isinstance(path, list) and len(path) == 1:
        path = path[0]
    if isinstance(path, bytes):
        path = path.decode("utf-8", "surrogateescape")
    if not isinstance(path, str) or not path.strip() or len(path) > 4096:
        return "", "no path of an image"
    if not is_utf8(path) or "\0" in path:
        return path, "path is not UTF-8 text"
    if is_url(path) or path.startswith("/"):
        start = directory.rstrip("/") + "/"
        if not path.startswith(start):
            if is_url(path):
                return path, "a URL and no file; download the images with img2dataset, then index its tars"
            return path, f"path outside {directory} (--images / allows it)"
        path = path[len(start) :]
    inner = posixpath.normpath(path)
    if inner.startswith(("../", "/")) or inner in (".", ".."):
        return path, f"path outside {directory}"
    return inner, ""
