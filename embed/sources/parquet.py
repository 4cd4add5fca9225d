"""Reads parquet files with image bytes or with paths of image files.

The image is a binary column, Hugging Face's struct of `bytes` and `path`, or a string column of paths. The
bytes are not read here: a row's place is its row group and its number in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_fast.data.images.parquet import ERRORS, check_row_group
from lit_fast.embed.sources.fields import Fields, choose, key_text, texts
from lit_fast.embed.sources.items import Damage, Item, Layout, LeftOut, Names, Sample
from lit_fast.embed.sources.paths import file_size, image_directory, inside
from lit_fast.embed.sources.tables import path_fields
from lit_fast.errors import UserError
from lit_fast.storage.read import folder, name, open_binary

_ROWS = 1024  # decoded at a time


def read_parquet(path: str, names: Names) -> Iterator[Item]:
    """One row per row, in order; a row without a key is called by its file and number.

    Raises:
      UserError: the file lacks a column, or its row groups are too large.
    """
    with open_binary(path) as file:
        try:
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)  # pages are read one by one
            image, fields = _columns(path, names, parquet)
            is_path = _is_path(path, parquet.schema_arrow, image)
        except ERRORS:
            yield Damage(f"{path} is damaged or is not a parquet file")
            return
        layout = (
            Layout("folder", images=image_directory(names.images, path))
            if is_path
            else Layout("parquet", image=image)
        )
        yield layout
        wanted = fields.columns() + ([image] if is_path else [])
        for group in range(parquet.num_row_groups):
            try:
                check_row_group(path, parquet, group)
                yield from _row_group(path, parquet, group, wanted, image, layout, fields)
            except ERRORS as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                yield Damage(f"{path} is damaged in row group {group}: the rest of it is not read ({reason})")
                return


def class_names(path: str) -> tuple[str, ...]:
    """The names of Hugging Face's `ClassLabel` in the file's metadata; () if there are none."""
    with open_binary(path) as file:
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


def _row_group(
    path: str,
    parquet: pq.ParquetFile,
    group: int,
    wanted: list[str],
    image: str,
    layout: Layout,
    fields: Fields,
) -> Iterator[Item]:
    batches = parquet.iter_batches(batch_size=_ROWS, row_groups=[group], columns=wanted, use_threads=False)
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            yield _item(path, values, (group, number), image, layout, fields)
            number += 1


def _item(
    path: str, values: dict[str, Any], place: tuple[int, int], image: str, layout: Layout, fields: Fields
) -> Item:
    captions, languages, label, problem = texts(values, fields)
    # The folder too, since file names repeat from folder to folder.
    own = f"{name(folder(path))}/{name(path)}/{place[0]}/{place[1]}"
    key, wrong = own, ""
    if layout.kind == "folder":
        size = 0
        key, wrong = inside(layout.images, _value(values, image))
        if not wrong:
            size, wrong = file_size(layout.images, key)
        place = (0, size)
    elif fields.key:
        key, wrong = key_text(values.get(fields.key))
    if wrong or problem:
        return LeftOut(key or own, wrong or problem)
    return Sample(key, *place, captions, label, languages)


def _value(values: dict[str, Any], column: str) -> Any:
    """A value of a row, or of a struct in it."""
    outer, _, inner = column.partition(".")
    return values[column] if column in values else (values.get(outer) or {}).get(inner)


def _columns(path: str, names: Names, parquet: pq.ParquetFile) -> tuple[str, Fields]:
    """The image's column, dotted within a struct, and the others."""
    image, schema = "", parquet.schema_arrow
    columns = schema.names
    if names.image and names.image not in columns:
        outer, _, inner = names.image.partition(".")
        if (
            outer in columns
            and pa.types.is_struct(kind := schema.field(outer).type)
            and kind.get_field_index(inner) >= 0
        ):
            image = names.image
            names = Names(names.captions, outer, names.key, names.label, names.language, names.images)
    fields = choose(names, columns, path)
    image = image or _image_column(path, schema, fields.image, parquet)
    if _is_path(path, schema, image):
        path_fields(names, columns, path)  # refuses --key
        fields = Fields(fields.image, fields.captions, "", fields.label, fields.language)
    captions = tuple((language, column) for language, column in fields.captions if column != fields.image)
    return image, Fields(fields.image, captions, fields.key, fields.label, fields.language)


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
    """Whether a column holds paths; bytes otherwise.

    Raises:
      UserError: it holds neither.
    """
    if image in schema.names:
        kind = schema.field(image).type
    else:
        outer, _, inner = image.partition(".")
        kind = schema.field(outer).type.field(inner).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return True
    if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        return False
    raise UserError(
        f"{path}: column {image} is of type {kind}, not an image's bytes or path; name it with --image"
    )
