"""Read the rows of a table with fields: separator, header, quotes.

Fields separated by a comma or a semicolon follow RFC 4180. Those separated by a tab or `|` are often written without
quoting rules: a quote counts as one only if it closes at the end of its field.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from lit_fast.embed.sources.interface import IMAGE_SUFFIXES, MAX_CAPTION, Guess, Skipped
from lit_fast.embed.sources.table_entries import Entry, Header, TableRow
from lit_fast.embed.sources.text_lines import Lines, is_too_long
from lit_fast.errors import UserError

_SEPARATORS = "\t,;|"
_OFTEN_UNQUOTED = "\t|"
_OPEN = "unexpected end of data"  # of the csv module
_MAX_LENIENT = 1 << 16  # characters within which a quote closes in a table that may have no quotes
_QUOTE_REMEDY = "close it, or double it and quote its field if it belongs to the text"


def field_entries(path: str, lines: Lines, known: Collection[str]) -> Iterator[Entry]:
    """Yield the header of a table, then its rows, skipped lines and guesses, in order.

    Args:
      path: of the table, for messages.
      known: lower-case names of columns by which the separator is recognized.

    Raises:
      UserError: a quote does not close, or not at the end of a field, or encloses rows.
    """
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

    def __init__(self, path: str, lines: Lines, separator: str, has_space: bool) -> None:
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
            if any(map(is_too_long, self._read)):
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
