"""Reads CSV, TSV and JSON lines whose rows name an image file and its captions.

The default columns of open_clip's CSV are `filepath` and `title`, of Hugging Face's image folders
`file_name` and `text`. A CSV with a tab in its first line is separated by tabs.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any

from lit_fast.embed.sources.fields import IMAGE, PATHS, Fields, choose, texts
from lit_fast.embed.sources.items import MAX_CAPTION, Damage, Item, Layout, LeftOut, Names, Sample
from lit_fast.embed.sources.paths import file_size, image_directory, inside
from lit_fast.errors import UserError
from lit_fast.storage.read import name, open_binary

MAX_LINE = 16 << 20  # characters


def read_table(path: str, names: Names) -> Iterator[Item]:
    """One row per line; repeats of an image are merged by the caller.

    Raises:
      UserError: the file cannot be read, or lacks a column.
    """
    directory = image_directory(names.images, path)
    yield Layout("folder", images=directory)
    with open_binary(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            yield from _rows(path, names, directory, text)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _rows(path: str, names: Names, directory: str, text: IO[str]) -> Iterator[Item]:
    fields: Fields | None = None
    for number, values in numbered_rows(path, text):
        if isinstance(values, str):
            yield LeftOut(f"line {number}", values)
            continue
        if fields is None:
            fields = path_fields(names, values, path)
        inner, problem = inside(directory, values.get(fields.image))
        if fields.image == "image/key" and not os.path.splitext(inner)[1]:
            inner += ".jpg"  # Crossmodal-3600 leaves it away
        size = 0
        if not problem:
            size, problem = file_size(directory, inner)
        captions, languages, label, wrong = texts(values, fields)
        if problem or wrong:
            yield LeftOut(inner or f"line {number}", problem or wrong)
        else:
            yield Sample(inner, 0, size, captions, label, languages)
    if fields is None:
        yield Damage(f"{path} has no rows")


def numbered_rows(path: str, text: IO[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and the fields by name, or what is wrong with the line."""
    json_lines = name(path).lower().endswith((".jsonl", ".ndjson"))
    return _json_lines(text) if json_lines else _csv_rows(text)


def path_fields(names: Names, columns: Iterable[str], where: str) -> Fields:
    """The columns of a table whose images are files: their path is the key."""
    if names.key:
        raise UserError(
            f"{where}: --key is not for tables of image files, where the path is the key; leave it out"
        )
    columns = list(columns)
    if not names.image:
        lowered = {c.lower(): c for c in reversed(columns)}
        found = next((lowered[c] for c in (*PATHS, *IMAGE) if c in lowered), "")
        names = Names(names.captions, found, "", names.label, names.language, names.images)
    return choose(names, columns, where)


def _csv_rows(text: IO[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(MAX_CAPTION)
    first = text.readline(MAX_LINE)
    text_lines = _lines(text)
    reader = csv.reader([first], delimiter="\t" if "\t" in first else ",")
    try:
        header = [column.strip() for column in next(reader, [])]
    except csv.Error as error:
        yield 1, f"not CSV: {error}"
        return
    if not any(header):
        return
    ended: list[bool] = []
    rows = csv.reader(_until(text_lines, ended), delimiter="\t" if "\t" in first else ",")
    while True:
        begin = rows.line_num + 2
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num + 1, f"not CSV: {error}"
            continue
        if ended:
            yield begin, "not CSV: a quote that is never closed; all after it is not read"
        elif len(row) > len(header):
            yield rows.line_num + 1, f"{len(row)} fields, where the first line has {len(header)}"
        elif row:
            yield rows.line_num + 1, dict(zip(header, row, strict=False))


def _until(lines: Iterator[str], ended: list[bool]) -> Iterator[str]:
    """The lines; `ended` gets an entry when one more was asked for, as within an open quote."""
    yield from lines
    ended.append(True)


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
    """Lines; what of one is longer than `MAX_LINE` is dropped, so that no file fills the memory."""
    while line := text.readline(MAX_LINE):
        yield line
        while not line.endswith(("\n", "\r")) and (line := text.readline(MAX_LINE)):
            pass
