"""Read captions and keys of imported features: tables with a row per feature."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain, islice, repeat
from typing import Any

import pyarrow.parquet as pq

from lit_fast.data.dataset import open_dataset
from lit_fast.data.dataset_writer import Row
from lit_fast.data.images.parquet import ERRORS, check_row_group
from lit_fast.embed.importers.parts import Part
from lit_fast.embed.sources.columns import (
    NO_KEY,
    NO_TEXT,
    PATHS,
    choose_columns,
    guess_column,
    nested_names,
    parse_key,
    parse_row,
    some,
    value_of,
)
from lit_fast.embed.sources.expand import expand
from lit_fast.embed.sources.first_rows import FIRST_ROWS, describe_refinement, refine_columns
from lit_fast.embed.sources.formats import format_of
from lit_fast.embed.sources.interface import Columns, Guess
from lit_fast.embed.sources.parquet import column_names, read_name, read_row_group
from lit_fast.embed.sources.tables import read_lines
from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import exists, is_directory, open_read
from lit_fast.storage.paths import StrPath, is_url, join, name, parent
from lit_fast.utils.output import status

_Values = Iterator[tuple[dict[str, Any], Columns]]


def imported_rows(parts: list[Part], tables: list[str], options: Columns) -> Iterator[tuple[Row, str]]:
    """Yield the rows of all parts in order, and why each cannot be a row ("" = it can).

    Args:
      tables: tables that have all rows one after the other; []: the parts' own metadata. If both have keys, these must
        be equal row by row.

    Raises:
      UserError: a table cannot be read, lacks a column, has another number of rows than there are features, or other
        keys than the features.
    """
    positions = ((source, number) for source, part in enumerate(parts) for number in range(part.rows))
    rows: _Values
    if tables:
        total, features = sum(part.rows for part in parts), parts[0].path
        if len(parts) > 1:
            features = parent(features)
        joined = chain.from_iterable(_read_table(table, options) for table in tables)
        named = tables[0] if len(tables) == 1 else f"{tables[0]} to {name(tables[-1])}"
        rows = _compared(_counted(joined, named, total, features), parts, tables[0])
    else:
        rows = chain.from_iterable(_read_metadata(part, options) for part in parts)
    for (source, number), (values, columns) in zip(positions, rows, strict=True):
        row = parse_row(values, columns)
        problem = "" if row.problem == NO_TEXT else row.problem  # features without text can be searched
        key, key_problem = parse_key(value_of(values, columns.key))
        if key_problem == NO_KEY:  # such a row is named after its file and its number there
            key, key_problem = f"{parts[source].label}/{number}", ""
        if not source and not number:
            status(_describe(values, columns, row.captions))
        imported = Row(key, source, number, 0, row.captions, languages=row.languages)
        yield imported, key_problem or problem


def _describe(values: dict[str, Any], columns: Columns, captions: tuple[str, ...]) -> str:
    """Return one line: the chosen columns and the first caption."""
    if not values:
        return "captions: none; give --captions-table"
    names = ", ".join(column for _, column in columns.captions) or "none"
    first = f" (first: {captions[0][:80]!r})" if captions else ""
    return (
        f"captions: column {names}{first}; keys: {f'column {columns.key}' if columns.key else 'file and row'}"
    )


def find_tables(table: StrPath) -> list[str]:
    """Return the files of `--captions-table` in their order, or the directory of a dataset."""
    table = os.fspath(table)
    if not is_url(table) and exists(join(table, "dataset.json")):
        return [os.path.abspath(table)]
    return expand([table])


def check_metadata(parts: list[Part]) -> None:
    """Raise UserError if a part's metadata has another number of rows.

    Only footers are read.
    """
    for part in parts:
        if part.metadata and part.metadata != part.path:
            with open_read(part.metadata) as file:
                try:
                    count = pq.read_metadata(file).num_rows
                except ERRORS:
                    raise UserError(
                        f"{part.metadata} is damaged or is not a parquet file; restore it"
                    ) from None
            _check_count(part.metadata, count, part.rows, part.path)


def _compared(rows: _Values, parts: list[Part], table: str) -> _Values:
    """Yield the rows of a table; refuse it where the keys beside the features are others."""
    if not all(part.metadata for part in parts):
        yield from rows
        return
    own = chain.from_iterable(_read_metadata(part, Columns()) for part in parts)
    for number, ((values, columns), (beside, theirs)) in enumerate(zip(rows, own, strict=True)):
        key, key_beside = value_of(values, columns.key), value_of(beside, theirs.key)
        if key is not None and key_beside is not None and parse_key(key) != parse_key(key_beside):
            raise UserError(
                f"{table} has {str(key)[:80]!r} in {columns.key}, row {number + 1:,}, where the features have "
                f"{str(key_beside)[:80]!r} in {theirs.key}; give the table of these features, in their order"
            )
        yield values, columns


def _read_metadata(part: Part, options: Columns) -> _Values:
    if not part.metadata:
        return repeat(({}, Columns()), part.rows)
    return _counted(_read_parquet(part.metadata, options, part.column), part.metadata, part.rows, part.path)


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
    key = columns.key or ("" if "key" in options.declined else guess_column(PATHS, names))
    return replace(columns, key=key, label="")


def _read_dataset(path: str, options: Columns) -> _Values:
    if options != Columns():
        raise UserError(f"{path} is a dataset and has no columns that options could name; leave them out")
    dataset = open_dataset(path)
    columns = Columns((("", "captions"),), key="key", language="languages")
    for block, captions in zip(dataset.iter_blocks(), dataset.iter_captions(), strict=True):
        for i, texts in enumerate(captions):
            languages = block.languages[i] if block.languages else []
            yield {"key": block.keys[i], "captions": texts, "languages": languages}, columns


def _read_table(path: str, options: Columns) -> _Values:
    if not is_url(path) and is_directory(path):
        yield from _read_dataset(path, options)
        return
    match format_of(path):
        case "parquet":
            yield from _read_parquet(path, options, needs_captions=True)
        case "table":
            lines = _read_lines(path)
            head = list(islice(lines, FIRST_ROWS))
            if head:
                columns = _columns(path, nested_names(head), options, needs_captions=True)
                yield from _refined(path, options, columns, chain(head, lines))
        case _:
            raise UserError(f"{path} is not a table; give a .csv, .tsv, .jsonl or .parquet file")


def _read_lines(path: str) -> Iterator[dict[str, Any]]:
    for number, values in read_lines(path):
        if isinstance(values, str):
            raise UserError(f"{path}, line {number}: {values}; every row of features needs its line")
        yield values


def _refined(path: str, options: Columns, columns: Columns, rows: Iterator[dict[str, Any]]) -> _Values:
    """Yield the rows with the columns; captions may be lists written as text, which the first rows show."""
    head = list(islice(rows, FIRST_ROWS))
    refined = refine_columns(path, options, columns, head)
    for item in describe_refinement(path, columns, refined, head):
        status(f"{name(path)}: guessed {item.text}" if isinstance(item, Guess) else f"warning: {item.text}")
    yield from ((values, refined) for values in chain(head, rows))


def _read_parquet(path: str, options: Columns, features: str = "", needs_captions: bool = False) -> _Values:
    with open_read(path) as file:
        try:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)
            schema = parquet.schema_arrow
            names = [name for name in column_names(schema) if name != features]
            columns = _columns(path, names, options, needs_captions)
            wanted = [read_name(schema, name) for name in columns.names()]
            yield from _refined(path, options, columns, _read_row_groups(path, parquet, wanted))
        except ERRORS as error:
            raise UserError(
                f"{path} is damaged or is not a parquet file ({first_line(error)}); restore it"
            ) from None


def _read_row_groups(path: str, parquet: pq.ParquetFile, names: list[str]) -> Iterator[dict[str, Any]]:
    for group in range(parquet.num_row_groups):
        check_row_group(path, parquet, group)
        yield from read_row_group(parquet, group, names)
