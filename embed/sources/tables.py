"""Read CSV, TSV and JSON lines whose rows name an image file and its captions.

The default columns of open_clip's CSV are `filepath` and `title`, of Hugging Face's image folders
`file_name` and `text`. A CSV with a tab in its first line is separated by tabs.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

from lit_fast.embed.sources.columns import IMAGE, PATHS, choose_columns, find_guess, guess_column, parse_row
from lit_fast.embed.sources.image_paths import find_image, image_directory
from lit_fast.embed.sources.interface import MAX_CAPTION, Columns, Damage, Item, Layout, Skipped
from lit_fast.errors import UserError, os_reason
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import suffix

MAX_LINE = 16 << 20  # characters


def read_table(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per line; the caller merges repeats of an image.

    Raises:
      UserError: the file cannot be read, or lacks a column.
    """
    directory = image_directory(options, path)
    yield Layout("folder", images=directory)
    columns: Columns | None = None
    for number, values in read_lines(path):
        if isinstance(values, str):
            yield Skipped(f"line {number}", values)
            continue
        if columns is None:
            columns = _columns(path, options, list(values))
            yield from find_guess(options, columns, list(values))
        default_suffix = ".jpg" if columns.image == "image/key" else ""  # Crossmodal-3600 omits it
        image = find_image(directory, values.get(columns.image), default_suffix)
        yield image.item(parse_row(values, columns), f"line {number}")
    if columns is None:
        yield Damage(f"{path} has no rows")


def read_lines(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the number of each line, and its values by column or the problem with it.

    Raises:
      UserError: the file cannot be read.
    """
    json_lines = suffix(path) in (".jsonl", ".ndjson")
    with open_read(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield from _json_lines(text) if json_lines else _csv_rows(text)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {os_reason(error)}") from None


def _columns(path: str, options: Columns, names: list[str]) -> Columns:
    image = options.image or guess_column((*PATHS, *IMAGE), names)
    return choose_columns(replace(options, image=image), names, path)


def _csv_rows(text: IO[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(MAX_CAPTION)
    first = text.readline(MAX_LINE)
    delimiter = "\t" if "\t" in first else ","
    try:
        header = [column.strip() for column in next(csv.reader([first], delimiter=delimiter), [])]
    except csv.Error as error:
        yield 1, f"not CSV: {error}"
        return
    if not any(header):
        return
    at_end: list[bool] = []
    rows = csv.reader(_lines_noting_end(text, at_end), delimiter=delimiter)
    while True:
        begin = rows.line_num + 2
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num + 1, f"not CSV: {error}"
            continue
        if at_end:
            yield begin, "not CSV: a quote that is never closed; all after it is not read"
        elif len(row) > len(header):
            yield rows.line_num + 1, f"{len(row)} fields, where the first line has {len(header)}"
        elif row:
            yield rows.line_num + 1, dict(zip(header, row, strict=False))


def _lines_noting_end(text: IO[str], at_end: list[bool]) -> Iterator[str]:
    """Yield the lines; fill `at_end` when one more is requested (an open quote)."""
    yield from _lines(text)
    at_end.append(True)


def _json_lines(text: IO[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            yield number, "line is not JSON"
            continue
        yield number, value if isinstance(value, dict) else "line is not a JSON object"


def _lines(text: IO[str]) -> Iterator[str]:
    """Yield lines, cut at `MAX_LINE` characters, so that no file fills the memory."""
    while line := text.readline(MAX_LINE):
        yield line
        while not line.endswith(("\n", "\r")) and (line := text.readline(MAX_LINE)):
            pass
