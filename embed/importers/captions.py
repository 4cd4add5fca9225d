"""The captions and keys of imported features: tables with one row per row of features, in the same order."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lit_fast.data.dataset_writer import Row
from lit_fast.data.images.parquet import ERRORS, check_row_group
from lit_fast.embed.importers.parts import Part
from lit_fast.embed.sources.expand import format_of
from lit_fast.embed.sources.fields import PATHS, Fields, choose, guess, key_text, some, texts
from lit_fast.embed.sources.items import Names
from lit_fast.embed.sources.tables import numbered_rows
from lit_fast.errors import UserError
from lit_fast.storage.read import open_binary

_ROWS = 1024  # decoded at a time

_Choose = Callable[[Collection[str]], Fields]
_Values = Iterator[tuple[dict[str, Any], Fields]]


def imported_rows(parts: list[Part], table: Path | None, names: Names) -> Iterator[tuple[Row, str]]:
    """The rows of all parts in order, and why one cannot be a row ("" = it can).

    Args:
      table: of all rows, instead of the parts' own metadata.
      names: of the columns.

    Raises:
      UserError: a table cannot be read, lacks a column, or has more or fewer rows than there are features.
    """
    places = ((source, number) for source, part in enumerate(parts) for number in range(part.rows))
    tables = _whole_table(parts, table, names) if table else _own_metadata(parts, names)
    for (source, number), (values, fields) in zip(places, tables, strict=True):
        captions, languages, _, problem = texts(values, fields)
        if problem == "no caption and no label":  # features alone can be searched
            problem = ""
        key, wrong = key_text(values.get(fields.key))
        if wrong == "no key":  # such a row is called by its file and its place in it
            key, wrong = f"{parts[source].path.stem}/{number}", ""
        yield Row(key, source, number, 0, captions, languages=languages), wrong or problem


def check_metadata(parts: list[Part]) -> None:
    """Raises UserError if a part's metadata are of another number of rows; reads their footers only."""
    for part in parts:
        if part.metadata is not None:
            with open_binary(str(part.metadata)) as file:
                try:
                    count = pq.ParquetFile(file).metadata.num_rows
                except ERRORS:
                    raise UserError(f"{part.metadata} is damaged or is not a parquet file") from None
            _check_count(part.metadata, count, part.rows, str(part.path))


def _own_metadata(parts: list[Part], names: Names) -> _Values:
    for part in parts:
        if part.metadata is None:
            yield from (({}, Fields()) for _ in range(part.rows))
            continue
        count = 0
        for count, row in enumerate(_parquet(part.metadata, _chosen(part.metadata, names)), 1):
            if count <= part.rows:
                yield row
        _check_count(part.metadata, count, part.rows, str(part.path))


def _whole_table(parts: list[Part], table: Path, names: Names) -> _Values:
    total, count = sum(part.rows for part in parts), 0

    def chosen(columns: Collection[str]) -> Fields:
        fields = _chosen(table, names)(columns)
        if not fields.captions:
            raise UserError(
                f"{table} has no column for captions among {some(columns)}; name it with --captions"
            )
        return fields

    for count, row in enumerate(_table(table, chosen), 1):
        if count <= total:
            yield row
    _check_count(table, count, total, str(parts[0].path.parent))


def _check_count(table: Path, count: int, wanted: int, features: str) -> None:
    if count != wanted:
        raise UserError(
            f"{table} has {count:,} rows, but {features} has {wanted:,} rows of features; each needs one"
        )


def _chosen(where: Path, names: Names) -> _Choose:
    """The columns of a table; a path of the image serves as key where there is no other."""

    def chosen(columns: Collection[str]) -> Fields:
        fields = choose(names, columns, str(where), image=False)
        return Fields("", fields.captions, fields.key or guess(PATHS, columns), "", fields.language)

    return chosen


def _table(path: Path, choose: _Choose) -> _Values:
    match format_of(str(path)):
        case "parquet":
            yield from _parquet(path, choose)
        case "table":
            fields: Fields | None = None
            with open_binary(str(path)) as file:
                text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
                for number, values in numbered_rows(str(path), text):
                    if isinstance(values, str):
                        raise UserError(
                            f"{path}, line {number}: {values}; every row of features needs its line"
                        )
                    fields = fields or choose(values)
                    yield values, fields
        case _:
            raise UserError(f"{path} is not a table; give a .csv, .tsv, .jsonl or .parquet file")


def _parquet(path: Path, choose: _Choose) -> _Values:
    with open_binary(str(path)) as file:
        try:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)
            fields = choose(parquet.schema_arrow.names)
            for group in range(parquet.num_row_groups):
                check_row_group(str(path), parquet, group)
                for batch in parquet.iter_batches(
                    _ROWS, row_groups=[group], columns=fields.columns(), use_threads=False
                ):
                    yield from ((values, fields) for values in batch.to_pylist())
        except ERRORS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{path} is damaged or is not a parquet file ({reason})") from None
