"""Images that are files of a folder."""

from __future__ import annotations

from urllib.parse import quote

from lit_fast.data.dataset import Source
from lit_fast.data.images.decode import MAX_IMAGE, ImageError
from lit_fast.errors import UserError
from lit_fast.storage.files import file_status, is_directory, read_range, read_whole
from lit_fast.storage.paths import is_url, join


def read_folder_image(source: Source, key: str) -> bytes:
    """Return the file `key` of a folder. The file may be missing; the folder must exist.

    Raises:
      ImageError: the file is missing, too large or not a regular file.
      UserError: the folder is missing.
      OSError: the file cannot be read.
    """
    if is_url(source.images):
        name = quote(key) if source.images.startswith("http") else key
        data = read_whole(f"{source.images}/{name}", MAX_IMAGE)
        if data is None:
            raise ImageError("image file not found")
        return data
    location = join(source.images, key)
    try:
        status = file_status(location)  # before opening: a pipe would block
        if not status.is_file:
            raise ImageError("not a regular file")
        if status.size > MAX_IMAGE:
            raise ImageError("image file above 256 MiB")
        return read_range(location, 0, status.size)
    except (FileNotFoundError, NotADirectoryError):
        if not is_directory(source.images):
            raise UserError(f"{source.images}, the images of {source.path}, is missing; restore it") from None
        raise ImageError("image file not found") from None
