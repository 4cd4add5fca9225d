"""Read the lines of a text file: compression, encoding, ends of lines."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from lit_fast.embed.sources.interface import is_utf8
from lit_fast.errors import UserError, unreadable
from lit_fast.storage.paths import suffix

MAX_LINE = 16 << 20  # characters
MAX_JSON = 1 << 30  # characters of a file that is one JSON value or whose objects span lines

_UNZIP: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_OTHERS = {b"\x28\xb5\x2f\xfd": "compressed with zstd", b"PK\x03\x04": "a zip or an Excel file"}
_BOMS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def table_suffix(path: str) -> str:
    """Return the suffix of a table, without that of its compression: ".csv" for "x.csv.gz"."""
    found = suffix(path)
    return suffix(path[: -len(found)]) if found in (".gz", ".bz2", ".xz", ".zst") else found


@contextmanager
def decompressed(path: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the content of a file that may be compressed, by its first bytes.

    Raises:
      UserError: the file cannot be read, or is compressed in a way that is not read.
    """
    try:
        start = file.read(6)
        file.seek(0)
    except OSError as error:
        raise unreadable(path, error) from None
    for magic, problem in _OTHERS.items():
        if start.startswith(magic):
            raise UserError(f"{path} is {problem}, which is not read; write it as plain text or with gzip")
    unzip = next((unzip for magic, unzip in _UNZIP.items() if start.startswith(magic)), None)
    if unzip is None:
        yield file
    else:
        with unzip(file) as plain:
            yield plain


def text_encoding(start: bytes) -> tuple[str, bool]:
    """Return the encoding of a text by its first bytes, and whether it is a guess that needs no byte order mark."""
    for bom, encoding in _BOMS.items():
        if start.startswith(bom):
            return encoding, False
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) * 8 > len(start):  # ASCII in UTF-16 has a zero in every second byte
        return ("utf-16-le" if odd > even else "utf-16-be"), True
    return "utf-8", False


def is_too_long(line: str) -> bool:
    """Return whether a line of `Lines` is only the beginning of a line above `MAX_LINE`."""
    return len(line) > MAX_LINE


class Lines:
    """The lines of a text with their ends (LF, CRLF or CR), of which some can be put back.

    Attributes:
      number: lines that were returned so far.
      undecodable: those among them that are not UTF-8.
    """

    def __init__(self, text: IO[str]) -> None:
        self.number = self.undecodable = 0
        self._text, self._back = text, deque[str]()

    def next(self) -> str | None:
        """Return the next line, None at the end; of one above `MAX_LINE`, only its begin of `MAX_LINE` + 1."""
        line = self._back.popleft() if self._back else self._read()
        if line:
            self.number += 1
        return line or None

    def put_back(self, lines: list[str]) -> None:
        """Return these lines, the last ones that were returned, again."""
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)

    def all(self) -> str | None:
        """Return the whole text before a line is read; None if it is above `MAX_JSON`."""
        text = self._text.read(MAX_JSON)
        return None if self._text.read(1) else text

    def _read(self) -> str:
        line = self._text.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE and not line.endswith(("\n", "\r")):
            while (more := self._text.readline(MAX_LINE)) and not more.endswith(("\n", "\r")):
                pass
        if not line.isascii() and not is_utf8(line):
            self.undecodable += 1
        return line
