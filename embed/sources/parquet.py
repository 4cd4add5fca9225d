"""Read parquet files with image bytes or with paths of image files.

The image is a binary column, Hugging Face's struct of `bytes` and `path`, or a string column of paths. The bytes are
not read here: a row is located by its row group and its number in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_fast.data.images.parquet import ERRORS, check_row_group
from lit_fast.embed.sources.columns import choose_columns, find_guess, parse_key, parse_row
from lit_fast.embed.sources.image_paths import find_image, image_directory
from lit_fast.embed.sources.interface import Columns, Damage, Item, Layout
from lit_fast.errors import UserError, first_line
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import name, parent

_BATCH_ROWS = 1024


def read_parquet(path: str, options: Columns) -> Iterator[Item]:
    """Yield all rows in order; a row without a key is named after its file and number.

    Raises:
      UserError: the file lacks a column, or its row groups are too large.
    """
    with open_read(path) as file:
        try:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)  # pages are read one by one
            columns = _columns(path, options, parquet)
            is_path = _is_path(path, parquet.schema_arrow, columns.image)
        except ERRORS:
            yield Damage(f"{path} is damaged or is not a parquet file")
            return
        layout = Layout("parquet", image=columns.image)
        if is_path:
            layout = Layout("folder", images=image_directory(options, path))
        yield layout
        yield from find_guess(options, columns, parquet.schema_arrow.names)
        wanted = columns.names() + ([columns.image] if is_path else [])
        for group in range(parquet.num_row_groups):
            try:
                check_row_group(path, parquet, group)
                for number, values in enumerate(read_row_group(parquet, group, wanted)):
                    yield _sample(path, values, group, number, layout, columns)
            except ERRORS as error:
                yield Damage(
                    f"{path} is damaged in row group {group}: the rest of it is not read ({first_line(error)})"
                )
                return


def class_names(path: str) -> tuple[str, ...]:
    """Return the names of Hugging Face's `ClassLabel` in the metadata; () without."""
    with open_read(path) as file:
        try:
            metadata = pq.read_schema(file).metadata or {}
            features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
            found = [
                f["names"]
                for f in features.values()
                if isinstance(f, dict) and f.get("_type") == "ClassLabel"
            ]
            return tuple(map(str, found[0])) if len(found) == 1 else ()
        except (*ERRORS, TypeError, AttributeError, RecursionError):
            return ()


def read_row_group(parquet: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of each row of a row group by column; raises `ERRORS` at damage."""
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _sample(
    path: str, values: dict[str, Any], group: int, number: int, layout: Layout, columns: Columns
) -> Item:
    # With the directory, since the names of files repeat in other directories.
    own_key = f"{name(parent(path))}/{name(path)}/{group}/{number}"
    row = parse_row(values, columns)
    if layout.kind == "folder":
        return find_image(layout.images, _value(values, columns.image)).item(row, own_key)
    key, problem = parse_key(values.get(columns.key)) if columns.key else (own_key, "")
    return row.item(key, group, number, problem, own_key)


def _value(values: dict[str, Any], column: str) -> Any:
    """Return the value of a column, or of a field of a struct."""
    outer, _, inner = column.partition(".")
    return values[column] if column in values else (values.get(outer) or {}).get(inner)


def _columns(path: str, options: Columns, parquet: pq.ParquetFile) -> Columns:
    """Choose the columns; that of the image is dotted where it is a field of a struct."""
    schema = parquet.schema_arrow
    image, outer = "", options.image
    if outer not in schema.names and _type_of(schema, outer) is not None:
        image, outer = outer, outer.partition(".")[0]
    columns = choose_columns(replace(options, image=outer), schema.names, path)
    # The column of the image is not used for captions, even if its name is one of theirs.
    captions = tuple((language, name) for language, name in columns.captions if name != columns.image)
    image = image or _image_column(path, schema, columns.image, parquet)
    return replace(columns, image=image, captions=captions)


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Return the type of a column, or of a field of a struct column; None if there is none."""
    outer, _, inner = column.partition(".")
    if column in schema.names or outer not in schema.names:
        return schema.field(column).type if column in schema.names else None
    struct = schema.field(outer).type
    is_field = pa.types.is_struct(struct) and struct.get_field_index(inner) >= 0
    return struct.field(inner).type if is_field else None


def _image_column(path: str, schema: pa.Schema, column: str, parquet: pq.ParquetFile) -> str:
    kind = schema.field(column).type
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
    return (
        first is not None and first.num_rows > 0 and first.column(0).flatten()[0].null_count == first.num_rows
    )


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
