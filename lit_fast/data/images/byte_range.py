"""Images that are a range of bytes of a file: the members of tar files."""

from __future__ import annotations

from lit_fast.errors import UserError
from lit_fast.storage.files import read_range


def read_byte_range(location: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on.

    Raises:
      UserError: the file ends earlier, or a URL cannot be read.
      OSError: a local file cannot be read.
    """
    data = read_range(location, offset, offset + size)
    if len(data) < size:
        raise UserError(f"{location} is shorter than when it was indexed; restore it")
    return data
