"""Read captions and keys of imported features: tables with a row per feature."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import pyarrow.parquet as pq

from lit_fast.data.dataset_writer import Row
from lit_fast.data.images.parquet import ERRORS, check_row_group
from lit_fast.embed.importers.parts import Part
from lit_fast.embed.sources.columns import (
    NO_KEY,
    NO_TEXT,
    PATHS,
    choose_columns,
    guess_column,
    parse_key,
    parse_row,
    some,
)
from lit_fast.embed.sources.formats import format_of
from lit_fast.embed.sources.interface import Columns
from lit_fast.embed.sources.parquet import read_row_group
from lit_fast.embed.sources.tables import read_lines
from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import parent, stem

_Values = Iterator[tuple[dict[str, Any], Columns]]


def imported_rows(parts: list[Part], table: str, options: Columns) -> Iterator[tuple[Row, str]]:
    """Yield the rows of all parts in order, and why each cannot be a row ("" = it can).

    Args:
      table: a table with all rows; "": the parts' own metadata.

    Raises:
      UserError: a table cannot be read, lacks a column, or has another number of rows than there are features.
    """
    positions = ((source, number) for source, part in enumerate(parts) for number in range(part.rows))
    if table:
        total, directory = sum(part.rows for part in parts), parent(parts[0].path)
        tables = _counted(_read_table(table, options), table, total, directory)
    else:
        tables = chain.from_iterable(_read_metadata(part, options) for part in parts)
    for (source, number), (values, columns) in zip(positions, tables, strict=True):
        row = parse_row(values, columns)
        problem = "" if row.problem == NO_TEXT else row.problem  # features without text can be searched
        key, key_problem = parse_key(values.get(columns.key))
        if key_problem == NO_KEY:  # such a row is named after its file and its number there
            key, key_problem = f"{stem(parts[source].path)}/{number}", ""
        imported = Row(key, source, number, 0, row.captions, languages=row.languages)
        yield imported, key_problem or problem


def check_metadata(parts: list[Part]) -> None:
    """Raise UserError if a part's metadata has another number of rows.

    Only footers are read.
    """
    for part in parts:
        if part.metadata:
            with open_read(part.metadata) as file:
                try:
                    count = pq.read_metadata(file).num_rows
                except ERRORS:
                    raise UserError(
                        f"{part.metadata} is damaged or is not a parquet file; restore it"
                    ) from None
            _check_count(part.metadata, count, part.rows, part.path)


def _read_metadata(part: Part, options: Columns) -> _Values:
    if not part.metadata:
        return repeat(({}, Columns()), part.rows)
    return _counted(_read_parquet(part.metadata, options), part.metadata, part.rows, part.path)


def _counted(rows: _Values, table: str, wanted: int, features: str) -> _Values:
    """Yield the rows of a table, and refuse another number than `wanted` at the end."""
    count = 0
    for count, row in enumerate(rows, 1):
        if count <= wanted:
            yield row
    _check_count(table, count, wanted, features)


def _check_count(table: str, count: int, wanted: int, features: str) -> None:
    if count != wanted:
        raise UserError(
            f"{table} has {count:,} rows, but {features} has {wanted:,} rows of features; each needs one"
        )


def _columns(table: str, names: Collection[str], options: Columns, needs_captions: bool) -> Columns:
    """Choose the columns of a table; the path of the image is the key if there is no other."""
    columns = choose_columns(options, names, table, image=False)
    if needs_captions and not columns.captions:
        raise UserError(f"{table} has no column for captions among {some(names)}; name it with --captions")
    key = columns.key or guess_column(PATHS, names)
    return replace(columns, key=key, label="")


def _read_table(path: str, options: Columns) -> _Values:
    match format_of(path):
        case "parquet":
            yield from _read_parquet(path, options, needs_captions=True)
        case "table":
            columns: Columns | None = None
            for number, values in read_lines(path):
                if isinstance(values, str):
                    raise UserError(f"{path}, line {number}: {values}; every row of features needs its line")
                columns = columns or _columns(path, values, options, needs_captions=True)
                yield values, columns
        case _:
            raise UserError(f"{path} is not a table; give a .csv, .tsv, .jsonl or .parquet file")


def _read_parquet(path: str, options: Columns, needs_captions: bool = False) -> _Values:
    with open_read(path) as file:
        try:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)
            columns = _columns(path, parquet.schema_arrow.names, options, needs_captions)
            for group in range(parquet.num_row_groups):
                check_row_group(path, parquet, group)
                for values in read_row_group(parquet, group, columns.names()):
                    yield values, columns
        except ERRORS as error:
            raise UserError(f"{path} is damaged or is not a parquet file ({first_line(error)})") from None
