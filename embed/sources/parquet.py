"""Read parquet files with image bytes or with paths of image files.

The image is a binary column, Hugging Face's struct of `bytes` and `path`, or a string column of paths. The bytes are
not read here: a row is located by its row group and its number in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lit_fast.data.images.parquet import ERRORS, check_row_group
from lit_fast.embed.sources.columns import (
    LABEL,
    choose_columns,
    find_guess,
    guess_column,
    parse_key,
    parse_row,
    value_of,
)
from lit_fast.embed.sources.first_rows import FIRST_ROWS, describe_refinement, refine_columns
from lit_fast.embed.sources.image_paths import clean_path, find_image, image_directory
from lit_fast.embed.sources.interface import Columns, Damage, Item, Layout
from lit_fast.embed.sources.parquet_footer import find_second_file
from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import name, parent

_BATCH_ROWS = 1024
_MAX_DEPTH = 5
_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def read_parquet(path: str, options: Columns) -> Iterator[Item]:
    """Yield all rows in order; a row without a key is named after its file and number.

    Raises:
      UserError: the file lacks a column, or its row groups are too large.
    """
    with open_read(path) as file:
        if position := find_second_file(file):
            yield Damage(f"{path} holds another parquet file from byte {position} on: none of it is read")
            return
        try:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)  # pages are read one by one
            names = column_names(parquet.schema_arrow)
            chosen = _columns(path, options, parquet, names)
            is_path = _is_path(path, parquet.schema_arrow, chosen.image)
        except ERRORS:
            yield Damage(f"{path} is damaged or is not a parquet file")
            return
        layout = Layout("parquet", image=chosen.image)
        if is_path:
            layout = Layout("folder", images=image_directory(options, path))
            chosen = replace(chosen, key="")
        wanted = chosen.names() + ([chosen.image] if is_path else [])
        rows = _rows(path, parquet, [read_name(parquet.schema_arrow, name) for name in wanted])
        head = list(islice(rows, FIRST_ROWS))
        first = [row.values for row in head if isinstance(row, _Row)]
        columns = refine_columns(path, options, chosen, first)
        yield layout
        yield from find_guess(options, columns, names)
        yield from describe_refinement(path, chosen, columns, first)
        for row in chain(head, rows):
            yield row if isinstance(row, Damage) else _sample(path, row, layout, columns)


class _Row(NamedTuple):
    group: int
    number: int  # in the group
    values: dict[str, Any]


def _rows(path: str, parquet: pq.ParquetFile, wanted: list[str]) -> Iterator[_Row | Damage]:
    """Yield all rows; damage, if a row group cannot be read or has another number of rows than the file says."""
    total = 0
    for group in range(parquet.num_row_groups):
        count = 0
        try:
            check_row_group(path, parquet, group)
            for count, values in enumerate(read_row_group(parquet, group, wanted), 1):
                yield _Row(group, count - 1, values)
            expected = parquet.metadata.row_group(group).num_rows
        except ERRORS as error:
            yield Damage(
                f"{path} is damaged in row group {group}: the rest of it is not read ({first_line(error)})"
            )
            return
        if count != expected:
            yield Damage(f"{path} is damaged: row group {group} has {count:,} rows instead of {expected:,}")
            return
        total += count
    if total != parquet.metadata.num_rows:
        yield Damage(f"{path} is damaged: it has {total:,} rows instead of {parquet.metadata.num_rows:,}")


def class_names(path: str, label: str) -> tuple[str, ...]:
    """Return the names of Hugging Face's `ClassLabel` of the label column; () without.

    Args:
      path: of the file.
      label: the option that names the column; "" guesses.
    """
    with open_read(path) as file:
        try:
            schema = pq.read_schema(file)
        except ERRORS:
            return ()
    return _class_labels(schema).get(label or _guess_label(schema), ())


def _guess_label(schema: pa.Schema) -> str:
    """Return the column whose name is one of labels', or the only `ClassLabel`; "" if there is none."""
    labels = list(_class_labels(schema))
    return guess_column(LABEL, schema.names) or (labels[0] if len(labels) == 1 else "")


def _class_labels(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Return the class names of each `ClassLabel` column that Hugging Face's metadata describe."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in schema.names
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def read_row_group(parquet: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of each row of a row group by column; raises `ERRORS` at damage."""
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _sample(path: str, row: _Row, layout: Layout, columns: Columns) -> Item:
    # With the directory, since the names of files repeat in other directories.
    own_key = f"{name(parent(path))}/{name(path)}/{row.group}/{row.number}"
    parsed = parse_row(row.values, columns)
    if layout.kind == "folder":
        image = clean_path(value_of(row.values, columns.image))
        return find_image(layout.images, image).item(parsed, own_key)
    key, problem = parse_key(value_of(row.values, columns.key)) if columns.key else (own_key, "")
    return parsed.item(key, row.group, row.number, problem, own_key)


def _columns(path: str, options: Columns, parquet: pq.ParquetFile, names: list[str]) -> Columns:
    """Choose the columns; that of the image is dotted where it is a field of a struct."""
    if not options.label and "label" not in options.declined:
        options = replace(options, label=_guess_label(parquet.schema_arrow))
    columns = choose_columns(options, names, path)
    # The column of the image is not used for captions, even if its name is one of theirs.
    captions = tuple((language, name) for language, name in columns.captions if name != columns.image)
    image = _image_column(path, parquet.schema_arrow, columns.image, parquet)
    return replace(columns, image=image, captions=captions)


def column_names(schema: pa.Schema) -> list[str]:
    """Return the names of all columns, then the dotted ones of the fields in them."""
    names, fields = list(schema.names), [(field.name, field.type, 0) for field in schema]
    while fields:
        name, kind, depth = fields.pop(0)
        kind = _without_lists(kind)
        if pa.types.is_struct(kind) and depth < _MAX_DEPTH:
            inner = [(f"{name}.{kind.field(i).name}", kind.field(i).type) for i in range(kind.num_fields)]
            names += [dotted for dotted, _ in inner]
            fields += [(dotted, type, depth + 1) for dotted, type in inner]
    return names


def _without_lists(kind: Any) -> Any:
    while any(test(kind) for test in _LISTS):
        kind = kind.value_type
    return kind


def read_name(schema: pa.Schema, column: str) -> str:
    """Return the name by which pyarrow reads a column: the dotted one in structs, the outer one in lists."""
    if column in schema.names or _type_of(schema, column) is not None:
        return column
    return next(name for name in schema.names if column.startswith(f"{name}."))


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Return the type of a column, or of a field in struct columns; None if there is none."""
    if column in schema.names:
        return schema.field(column).type
    for outer in schema.names:
        if column.startswith(f"{outer}."):
            return _field_type(schema.field(outer).type, column[len(outer) + 1 :])
    return None


def _field_type(kind: Any, name: str) -> pa.DataType | None:
    if not pa.types.is_struct(kind):
        return None
    for i in range(kind.num_fields):
        field = kind.field(i)
        if name == field.name:
            return field.type
        if name.startswith(f"{field.name}."):
            return _field_type(field.type, name[len(field.name) + 1 :])
    return None


def _image_column(path: str, schema: pa.Schema, column: str, parquet: pq.ParquetFile) -> str:
    kind: Any = _type_of(schema, column)
    if not pa.types.is_struct(kind):
        return column
    inner = [kind.field(i).name for i in range(kind.num_fields)]
    if "bytes" in inner and not ("path" in inner and _all_null(parquet, f"{column}.bytes")):
        return f"{column}.bytes"
    if "path" in inner:
        return f"{column}.path"
    raise UserError(
        f"{path}: column {column} is a struct of {', '.join(inner)} without bytes or path; name another"
    )


def _all_null(parquet: pq.ParquetFile, leaf: str) -> bool:
    """Whether the first rows hold nothing in a column."""
    batches = parquet.iter_batches(batch_size=16, columns=[leaf], use_threads=False)
    first = next(batches, None)
    if first is None or not first.num_rows:
        return False
    values = first.column(0)
    while pa.types.is_struct(values.type):
        values = values.flatten()[0]
    return values.null_count == first.num_rows


def _is_path(path: str, schema: pa.Schema, image: str) -> bool:
    """Whether a column holds paths and not bytes.

    Raises:
      UserError: it holds neither.
    """
    kind: Any = _type_of(schema, image)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return True
    if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        return False
    raise UserError(
        f"{path}: column {image} is of type {kind}, not an image's bytes or path; name it with --image"
    )
