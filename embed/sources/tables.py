"""Read tables whose rows name an image file and its captions: CSV, TSV, JSON lines and the like.

The default columns of open_clip's CSV are `filepath` and `title`, of Hugging Face's image folders
`file_name` and `text`, of Flickr8k's `captions.txt` `image` and `caption`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from lit_fast.embed.sources.columns import (
    CAPTIONS,
    IMAGE,
    LABEL,
    PATHS,
    URLS,
    choose_columns,
    find_guess,
    guess_column,
    nested_names,
    parse_row,
    value_of,
)
from lit_fast.embed.sources.delimited import is_image_name
from lit_fast.embed.sources.first_rows import FIRST_ROWS, describe_refinement, refine_columns
from lit_fast.embed.sources.image_paths import clean_path, find_image, find_subdirectory, image_directory
from lit_fast.embed.sources.interface import Columns, Damage, Guess, Item, Layout, Skipped
from lit_fast.embed.sources.table_entries import Entry, Header, TableRow
from lit_fast.embed.sources.text_tables import read_entries
from lit_fast.errors import UserError
from lit_fast.storage.paths import name

KNOWN_COLUMNS = frozenset((*CAPTIONS, *IMAGE, *PATHS, *LABEL, *URLS))
_CAPTION_NUMBER = re.compile(r"(.+\.[a-z]{3,4})#[0-9]+", re.IGNORECASE | re.ASCII)  # Flickr8k: x.jpg#0


def read_table(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per row of the table; the caller merges repeats of an image.

    Raises:
      UserError: the file cannot be read, or lacks a column.
    """
    known = KNOWN_COLUMNS | {column.lower() for column in _named(options)}
    return table_rows(path, options, read_entries(path, known))


def table_rows(path: str, options: Columns, entries: Iterator[Entry]) -> Iterator[Item]:
    """Yield one row per row of a table; the caller merges repeats of an image.

    Args:
      path: of the table, beside the images.
      options: those of the command.
      entries: the header, if it has one, and the rows.

    Raises:
      UserError: the table lacks a column.
    """
    directory = image_directory(options, path)
    head: list[Entry] = []
    header: Header | None = None
    is_damaged = False
    for entry in entries:
        if isinstance(entry, TableRow):
            head = [entry, *islice(entries, FIRST_ROWS - 1)]
            break
        if isinstance(entry, Header):
            header = entry
        else:
            is_damaged |= isinstance(entry, Damage)
            yield entry
    if not head:
        yield Layout("folder", images=directory)
        if not is_damaged:
            yield Damage(f"{path} has no rows")
        return
    rows = [entry.values for entry in head if isinstance(entry, TableRow)]
    chosen, names = _choose(path, options, header, rows)
    columns = refine_columns(path, options, chosen, rows)
    first_image = _image_of(rows[0], columns)
    subdirectory = "" if options.images else find_subdirectory(directory, first_image)
    yield Layout("folder", images=subdirectory or directory)
    if header and header.is_numbered:
        yield Guess("header = none")
    yield from find_guess(options, columns, names)
    if subdirectory:
        yield Guess(f"images = {name(subdirectory)}/")
    yield from describe_refinement(path, chosen, columns, rows)
    directory = subdirectory or directory
    default_suffix = ".jpg" if columns.image == "image/key" else ""  # Crossmodal-3600 omits it
    while head:
        for entry in head:
            if isinstance(entry, TableRow):
                image = find_image(directory, _image_of(entry.values, columns), default_suffix)
                yield image.item(parse_row(entry.values, columns), entry.name)
            elif not isinstance(entry, Header):
                yield entry
        head = list(islice(entries, FIRST_ROWS))


def read_lines(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the number of each row's line, and its values by column or the problem with it.

    Raises:
      UserError: the file cannot be read.
    """
    number = 0
    for entry in read_entries(path, KNOWN_COLUMNS):
        match entry:
            case TableRow(number, values):
                yield number, values
            case Skipped(where, reason):
                number = int(where.rpartition(" ")[2])
                yield number, reason
            case Damage(description):
                yield number + 1, description


def _named(options: Columns) -> list[str]:
    return [*options.names(), options.image]


def _choose(
    path: str, options: Columns, header: Header | None, rows: Sequence[Mapping[str, Any]]
) -> tuple[Columns, list[str]]:
    """Choose the columns of a table; return them, and the names of all."""
    names = [*dict.fromkeys([*(header.names if header else ()), *nested_names(rows)])]
    names = [column for column in names if column]
    if header and len(header.names) == 1 and not options.names():
        raise UserError(
            f"{path} has one column, {header.names[0][:80]!a}; separate the image and its captions by a comma, a tab, "
            "';' or '|'"
        )
    if header and header.is_numbered:
        options = _by_content(options, header.names, rows)
    image = options.image or guess_column((*PATHS, *IMAGE), names)
    columns = replace(choose_columns(replace(options, image=image), names, path), key="")
    for column in _named(columns):
        if header and header.names.count(column) > 1:
            raise UserError(f"{path} has {header.names.count(column)} columns {column}; rename all but one")
    return columns, names


def _by_content(options: Columns, names: list[str], rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Choose numbered columns: names of image files, and of the others with letters that with the most words."""
    image = options.image or next((n for n in names if all(is_image_name(row[n]) for row in rows)), names[0])
    captions = options.captions
    if not captions and "captions" not in options.declined:
        named = {image, *options.names()}
        others = [n for n in names if n not in named and any(re.search(r"[^\W\d_]", row[n]) for row in rows)]
        words = {n: sum(len(row[n].split()) for row in rows) for n in others}
        captions = (("", max(words, key=words.__getitem__)),) if words else ()
    return replace(options, image=image, captions=captions)


def _image_of(values: Mapping[str, Any], columns: Columns) -> Any:
    """Return the path in a row, without the number of the caption that Flickr8k appends to it."""
    value = clean_path(value_of(values, columns.image))
    match = _CAPTION_NUMBER.fullmatch(value) if isinstance(value, str) and "#" in value else None
    return match[1] if match and is_image_name(match[1]) else value
