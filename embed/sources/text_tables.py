"""Read the rows of CSV, TSV and JSON tables.

Every line of a file is the header, blank, part of a row, or skipped with a reason; or the file is damaged from there.
"""

from __future__ import annotations

import io
import json
import lzma
import zlib
from collections.abc import Collection, Iterator
from typing import Any

from lit_fast.embed.sources.delimited import field_entries
from lit_fast.embed.sources.interface import Damage, Guess, Note, Skipped
from lit_fast.embed.sources.table_entries import Entry, TableRow
from lit_fast.embed.sources.text_lines import Lines, decompressed, is_too_long, table_suffix, text_encoding
from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.files import open_read

_HEAD = 1 << 16  # bytes from which the encoding is guessed
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def read_entries(path: str, known: Collection[str] = ()) -> Iterator[Entry]:
    """Yield the header of a table without JSON, then its rows, skipped lines and damage, in order.

    Args:
      path: of the table. `.json`, `.jsonl` and `.ndjson` are JSON, all others have fields.
      known: lower-case names of columns by which the separator is recognized.

    Raises:
      UserError: the file cannot be read, is of another format, or has a quote that does not close.
    """
    with open_read(path) as file, decompressed(path, file) as plain:
        try:
            start = plain.read(_HEAD)
            plain.seek(0)
            encoding, guess = text_encoding(start)
            if guess:
                yield Guess(f"encoding = {encoding}")
            errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
            lines = Lines(io.TextIOWrapper(plain, encoding=encoding, errors=errors, newline=""))
            if table_suffix(path) in (".json", ".jsonl", ".ndjson"):
                spans = _spans_lines(start.decode(encoding, "replace"))
                yield from _json_values(path, lines) if spans else _json_lines(lines)
            else:
                yield from field_entries(path, lines, known)
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
    text = start.decode(text_encoding(start)[0], "replace").lstrip("\ufeff \t\r\n")
    lines = [line for line in text.splitlines()[:100] if line.strip()]
    return len(lines) > 1 and isinstance(_parse_json(lines[0]), dict) and lines[1].startswith("{")


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


def _json_lines(lines: Lines) -> Iterator[Entry]:
    while (line := lines.next()) is not None:
        if not line.strip():
            continue
        value = None if is_too_long(line) else _parse_json(line)
        if isinstance(value, dict):
            yield TableRow(lines.number, value)
        elif is_too_long(line):
            yield Skipped(f"line {lines.number}", "line above 16 MiB")
        else:
            problem = "line is not JSON" if value is ... else "line is not a JSON object"
            yield Skipped(f"line {lines.number}", problem)


def _json_values(path: str, lines: Lines) -> Iterator[Entry]:
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
