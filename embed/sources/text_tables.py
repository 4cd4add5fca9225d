"""Read the lines of CSV, TSV and JSON tables: encoding, compression, separator, quotes.

Fields separated by a comma or a semicolon follow RFC 4180. Those separated by a tab or `|` are often written without
quoting rules: a quote counts as one only if it closes at the end of its field.

Every line of a file is the header, blank, part of a row, or skipped with a reason; or the file is damaged from there.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import IO, Any, NamedTuple

from lit_fast.embed.sources.interface import (
    IMAGE_SUFFIXES,
    MAX_CAPTION,
    Damage,
    Guess,
    Note,
    Skipped,
    is_utf8,
)
from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import suffix

MAX_LINE = 16 << 20  # characters
MAX_JSON = 1 << 30  # characters of a file that is one JSON value or whose objects span lines

_HEAD = 1 << 16  # bytes from which the encoding is guessed
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
_SEPARATORS = "\t,;|"
_OFTEN_UNQUOTED = "\t|"
_OPEN = "unexpected end of data"  # of the csv module
_MAX_LENIENT = 1 << 16  # characters within which a quote closes in a table that may have no quotes
_QUOTE_REMEDY = "close it, or double it and quote its field if it belongs to the text"
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class TableRow(NamedTuple):
    """One row of a table."""

    number: int  # of its first line, from 1 on; of the object in JSON that spans lines
    values: dict[str, Any]
    lines: int = 1
    unit: str = "line"

    @property
    def name(self) -> str:
        """Name of the row for messages."""
        return f"{self.unit} {self.number}"


class Header(NamedTuple):
    """The names of a table's columns in order; without a header line they are "1", "2", ..."""

    names: list[str]
    is_numbered: bool = False


Entry = Header | TableRow | Guess | Note | Skipped | Damage


def read_entries(path: str, known: Collection[str] = ()) -> Iterator[Entry]:
    """Yield the header of a table without JSON, then its rows, skipped lines and damage, in order.

    Args:
      path: of the table. `.json`, `.jsonl` and `.ndjson` are JSON, all others have fields.
      known: lower-case names of columns by which the separator is recognized.

    Raises:
      UserError: the file cannot be read, is of another format, or has a quote that does not close.
    """
    with open_read(path) as file, _decompressed(path, file) as plain:
        try:
            start = plain.read(_HEAD)
            plain.seek(0)
            encoding, guess = _encoding(start)
            if guess:
                yield Guess(f"encoding = {encoding}")
            errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
            lines = _Lines(io.TextIOWrapper(plain, encoding=encoding, errors=errors, newline=""))
            if table_suffix(path) in (".json", ".jsonl", ".ndjson"):
                spans = _spans_lines(start.decode(encoding, "replace"))
                yield from _json_values(path, lines) if spans else _json_lines(lines)
            else:
                yield from _field_entries(path, lines, known)
        except UnicodeError:
            yield Damage(
                f"{path} is damaged or cut off after line {lines.number}: it is not {encoding} there"
            )
            return
        except _READ_ERRORS as error:
            if isinstance(error, OSError) and (plain is file or error.errno is not None):
                raise unreadable(path, error) from None
            yield Damage(f"{path} is damaged or cut off: the rest of it is not read ({first_line(error)})")
            return
    if lines.undecodable:
        yield Note(
            f"{path} has {lines.undecodable:,} lines that are not UTF-8; if it is in Windows-1252 or Latin-1, convert "
            "it with: iconv -f WINDOWS-1252 -t UTF-8"
        )


def is_json_lines(path: str) -> bool:
    """Whether a JSON file has an object per line; not one that cannot be read."""
    try:
        with open_read(path) as file:
            start = file.read(_HEAD)
    except (UserError, OSError):
        return False
    text = start.decode(_encoding(start)[0], "replace").lstrip("\ufeff \t\r\n")
    lines = [line for line in text.splitlines()[:100] if line.strip()]
    return len(lines) > 1 and isinstance(_parse_json(lines[0]), dict) and lines[1].startswith("{")


def table_suffix(path: str) -> str:
    """Return the suffix of a table, without that of its compression: ".csv" for "x.csv.gz"."""
    found = suffix(path)
    return suffix(path[: -len(found)]) if found in (".gz", ".bz2", ".xz", ".zst") else found


@contextmanager
def _decompressed(path: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
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


def _encoding(start: bytes) -> tuple[str, bool]:
    """Return the encoding of a text by its first bytes, and whether it is a guess that needs no byte order mark."""
    for bom, encoding in _BOMS.items():
        if start.startswith(bom):
            return encoding, False
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) * 8 > len(start):  # ASCII in UTF-16 has a zero in every second byte
        return ("utf-16-le" if odd > even else "utf-16-be"), True
    return "utf-8", False


class _Lines:
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


# --- JSON


def _spans_lines(start: str) -> bool:
    """Whether a JSON text is one array, or has an object that spans lines at its begin."""
    start = start.lstrip("\ufeff \t\r\n")
    if start.startswith("["):
        return True
    lines = [line for line in start.splitlines() if line.strip()]
    return len(lines) > 1 and not any(isinstance(_parse_json(line), dict) for line in lines[:2])


def _parse_json(text: str) -> Any:
    """Return the value of a JSON text; `...` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ...


def _json_lines(lines: _Lines) -> Iterator[Entry]:
    while (line := lines.next()) is not None:
        if not line.strip():
            continue
        value = _parse_json(line) if len(line) <= MAX_LINE else None
        if isinstance(value, dict):
            yield TableRow(lines.number, value)
        elif len(line) > MAX_LINE:
            yield Skipped(f"line {lines.number}", "line above 16 MiB")
        else:
            problem = "line is not JSON" if value is ... else "line is not a JSON object"
            yield Skipped(f"line {lines.number}", problem)


def _json_values(path: str, lines: _Lines) -> Iterator[Entry]:
    """Yield the objects of a text that is one array, or a sequence of objects."""
    text = lines.all()
    if text is None:
        raise UserError(f"{path} is one JSON value above 1 GiB; write it as .jsonl, with one object per line")
    decoder, number, position = json.JSONDecoder(), 0, _skip_space(text, 0)
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            rest = f" after object {number}: the rest of it is not read" if number else ""
            yield Damage(f"{path} is not JSON{rest}")
            return
        for item in value if isinstance(value, list) else [value]:
            number += 1
            if isinstance(item, dict):
                yield TableRow(number, item, unit="object")
            else:
                yield Skipped(f"object {number}", "value is not a JSON object")
        position = _skip_space(text, position)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in "\ufeff \t\r\n":
        position += 1
    return position


# --- fields


def _field_entries(path: str, lines: _Lines, known: Collection[str]) -> Iterator[Entry]:
    csv.field_size_limit(MAX_CAPTION)
    first = lines.next()
    while first is not None and not first.strip():
        first = lines.next()
    if first is None:
        return
    separator = ""
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's
        separator, first = first.strip()[4], lines.next() or ""
    lines.put_back([first])
    separator = separator or _separator(first, known)
    has_space = first.count(separator + " ") == first.count(separator) > 0
    records = _Records(path, lines, separator, has_space)
    names: list[str] | None = None
    has_unquoted = False
    while (record := records.next()) is not None:
        if isinstance(record, Skipped):
            yield record
            continue
        if names is None:
            names = [field.strip() for field in record.fields]
            is_header = not any(is_image_name(name) for name in names)
            if not is_header:
                names = [str(i + 1) for i in range(len(names))]
            records.width = len(names)
            yield Header(names, not is_header)
            if is_header:
                continue
        fields = record.fields
        while len(fields) > len(names) and not fields[-1].strip():
            fields.pop()  # a separator at the end of the line
        if len(fields) < len(names) and not any(names[len(fields) :]):
            fields += [""] * (len(names) - len(fields))  # one at the end of the header
        if len(fields) > len(names) == 2 and _is_unquoted_caption(fields[0], record.text):
            if not has_unquoted:
                has_unquoted = True
                yield Guess(f"a {separator!a} in a caption = text, as it is not quoted in two columns")
            fields = record.text.rstrip("\r\n").split(separator, 1)
        if len(fields) != len(names):
            counts = (
                f"{len(fields)} field{'s' if len(fields) != 1 else ''}, where the first line has {len(names)}"
            )
            yield from (Skipped(f"line {record.line + i}", counts) for i in range(record.lines))
            continue
        values = {name: field for name, field in zip(names, fields, strict=True) if name}
        yield TableRow(record.line, values, record.lines)


def _is_unquoted_caption(image: str, line: str) -> bool:
    """Whether all behind the first field of a line is one caption, as in CLIP_benchmark's files of Flickr8k."""
    return is_image_name(image) and '"' not in line and "\n" not in line.rstrip("\r\n")


def is_image_name(text: str) -> bool:
    """Whether a text ends like the name of an image file, also in Flickr8k's form `x.jpg#0`."""
    stem, number, digits = text.strip().lower().rpartition("#")
    return (stem if number and digits.isdigit() else text.strip().lower()).endswith(IMAGE_SUFFIXES)


def _separator(line: str, known: Collection[str]) -> str:
    """Return the separator that makes most known names of columns in a header, then most fields."""

    def score(separator: str) -> tuple[int, int]:
        fields = _split(line, separator)
        names = {field.strip().strip('"').lower() for field in fields}
        return sum(name in known or is_image_name(name) for name in names), len(fields)

    best = max(_SEPARATORS, key=score)  # the first of equal ones
    return best if best in line else ","


def _split(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])


class _Record(NamedTuple):
    fields: list[str]
    line: int
    lines: int
    text: str  # with the ends of its lines


class _Records:
    """The records of a table with fields.

    Attributes:
      width: number of fields of the header; 0 before it is known.
    """

    def __init__(self, path: str, lines: _Lines, separator: str, has_space: bool) -> None:
        """Set up the records; a space follows each separator if `has_space`."""
        self.width = 0
        self._path, self._lines, self._separator, self._has_space = path, lines, separator, has_space
        self._read: list[str] = []  # lines of the record that is read
        self._reader = self._parser(self._feed())

    def next(self) -> _Record | Skipped | None:
        """Return the next record that is not blank, or a line that is none; None at the end.

        Raises:
          UserError: a quote does not close, or not at the end of a field, or encloses rows.
        """
        while True:
            self._read.clear()
            fields = self._lenient() if self._separator in _OFTEN_UNQUOTED else self._strict()
            line = self._lines.number + 1 - len(self._read)
            if max(map(len, self._read), default=0) > MAX_LINE:
                return Skipped(f"line {line}", "line above 16 MiB")
            if isinstance(fields, str):
                return Skipped(f"line {line}", f"not CSV: {fields}")
            if fields is None:
                return None
            if len(self._read) > 1 or not self._read[0].isspace():
                return _Record(fields, line, len(self._read), "".join(self._read))

    def _parser(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._separator, skipinitialspace=self._has_space, strict=True)

    def _feed(self) -> Iterator[str]:
        while (line := self._lines.next()) is not None:
            self._read.append(line)
            yield line

    def _strict(self) -> list[str] | str | None:
        """Return the fields of the next record, None at the end, or why its only line is none."""
        try:
            fields = next(self._reader, None)
        except csv.Error as error:
            if len(self._read) == 1 and str(error) != _OPEN:
                return str(error)
            problem = "never closes" if str(error) == _OPEN else f"does not close properly ({error})"
            raise UserError(f"{self._opening()} {problem}; {_QUOTE_REMEDY}") from None
        if fields and len(self._read) > 1 and self._encloses_rows(fields):
            raise UserError(
                f"{self._opening()} closes in line {self._lines.number}, after lines that look like rows; "
                f"{_QUOTE_REMEDY}"
            )
        return fields

    def _lenient(self) -> list[str] | None:
        """Return the fields of the next record; a quote that does not close at the end of its field is text."""
        line = next(self._feed(), None)
        if line is None:
            return None
        plain = line.rstrip("\r\n").split(self._separator)
        if self._has_space:
            plain = [field.removeprefix(" ") for field in plain]
        if '"' not in line:
            return plain
        size, problem = len(line), ""
        for more in chain([""], self._feed()):
            size += len(more)
            if size > _MAX_LENIENT:
                break
            if more and '"' not in more:
                continue
            try:
                fields = next(self._parser(self._read))
            except csv.Error as error:
                problem = str(error)
                if problem != _OPEN:
                    break
                continue
            is_whole = not self.width or len(fields) == self.width
            if len(self._read) == 1 or (is_whole and not self._are_rows(fields)):
                return fields
            break
        self._lines.put_back(self._read[1:])
        del self._read[1:]
        return plain

    def _are_rows(self, fields: list[str]) -> bool:
        """Whether the lines of a record are rows by themselves."""
        width = self.width or len(fields)
        if all(line.count(self._separator) + 1 == width for line in self._read):
            return True
        return self._encloses_rows(fields)

    def _encloses_rows(self, fields: list[str]) -> bool:
        """Whether a line of a record looks like a row by itself: it has an image where the record has one.

        In the first line this is natural for the fields before the quote that opens there, in the last line for those
        behind the quote that closes there.
        """
        several = [i for i, field in enumerate(fields) if "\n" in field or "\r" in field]
        images = [i for i, field in enumerate(fields) if is_image_name(field)]
        for number, line in enumerate(self._read):
            own = line.rstrip("\r\n").split(self._separator) if number == 0 else _split(line, self._separator)
            for i in images if len(own) == len(fields) else ():
                is_natural = (number == 0 and i <= min(several, default=0)) or (
                    number == len(self._read) - 1 and i >= max(several, default=0)
                )
                if not is_natural and is_image_name(own[i]):
                    return True
        return False

    def _opening(self) -> str:
        """Name the line in which the last quote of a record opens."""
        first = self._lines.number + 1 - len(self._read)
        odd = [i for i, line in enumerate(self._read) if line.count('"') % 2]
        # Quotes come in pairs: each second line with an odd number of them closes the quote of the one before.
        opening = odd[-1] if len(odd) % 2 else odd[-2] if odd else 0
        return f"{self._path}, line {first + opening}: a quote that opens there"
