"""Read array_record files of `tf.train.Example`, as TensorFlow Datasets writes them.

`features.json` in the same directory says which feature is an image, `<label>.labels.txt` has the class names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lit_fast.data.images.fingerprint import image_checksum
from lit_fast.data.images.tf_examples import ERRORS, ExampleError, open_records, parse_example
from lit_fast.embed.sources.columns import LABEL, choose_columns, guess_column, parse_key, parse_row
from lit_fast.embed.sources.interface import Columns, Damage, Item, Layout, Skipped
from lit_fast.errors import first_line
from lit_fast.storage.files import read_text
from lit_fast.storage.paths import join, name, parent

_RECORDS_PER_READ = 64


def read_records(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per record; a row without a key is named after its file and number.

    Raises:
      UserError: the records lack a feature, or the file cannot be read.
    """
    columns: Columns | None = None
    try:
        reader = open_records(path)
        count = reader.num_records()
    except ERRORS:
        yield Damage(f"{path} is damaged or is not an array_record file")
        return
    first = 0
    try:
        while first < count:
            records = reader.read(first, min(first + _RECORDS_PER_READ, count))
            for number, record in enumerate(records, first):
                try:
                    values = parse_example(bytes(record))
                except ExampleError as error:
                    yield Skipped(_own_key(path, number), f"not a tf.train.Example ({error})")
                    continue
                if columns is None:
                    columns = _columns(path, options, values)
                    yield Layout("array_record", image=columns.image)
                yield _sample(path, number, values, columns)
            first += len(records)
            if not records:
                raise ValueError("no records where some should be")
    except ERRORS as error:
        yield Damage(
            f"{path} is damaged at record {first} or after: the rest of it is not read ({first_line(error)})"
        )


def class_names(path: str) -> tuple[str, ...]:
    """Return the lines of the `<label>.labels.txt` beside a file; () without one.

    `<label>` must be a feature.
    """
    for feature in dict.fromkeys([*_typed_features(path).get("ClassLabel", []), *LABEL]):
        if "/" not in feature and (text := read_text(join(parent(path), f"{feature}.labels.txt"))):
            return tuple(line.strip() for line in text.splitlines() if line.strip())
    return ()


def _sample(path: str, number: int, values: dict[str, Any], columns: Columns) -> Item:
    row, own_key = parse_row(values, columns), _own_key(path, number)
    key, problem = parse_key(values.get(columns.key)) if columns.key else (own_key, "")
    image = values.get(columns.image)
    if not (image and isinstance(image[0], bytes) and image[0]):
        problem = problem or row.problem or f"no image in {columns.image}"
        return row.item(key, number, 0, problem, own_key)
    return row.item(key, number, 0, problem, own_key, image_checksum(image[0]))


def _own_key(path: str, number: int) -> str:
    return f"{name(parent(path))}/{name(path)}/{number}"


def _columns(path: str, options: Columns, values: dict[str, Any]) -> Columns:
    names, typed = list(values), _typed_features(path)
    image = options.image or guess_column(typed.get("Image", []), names)
    label = options.label or guess_column(typed.get("ClassLabel", []), names)
    return choose_columns(replace(options, image=image, label=label), names, path)


def _typed_features(path: str) -> dict[str, list[str]]:
    """Return the names in TFDS's features.json, lower-case, by type: "Image", ..."""
    found: dict[str, list[str]] = {}
    try:
        value = json.loads(read_text(join(parent(path), "features.json")) or "{}")
        for feature, description in value["featuresDict"]["features"].items():
            kind = str(description["pythonClassName"]).rpartition(".")[2]
            found.setdefault(kind, []).append(feature.lower())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return found
    return found
