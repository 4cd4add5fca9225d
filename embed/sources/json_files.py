"""Read a JSON file: COCO's captions, Karpathy's splits, or a list of objects that name an image and its captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lit_fast.data.images.sources import size_and_etag
from lit_fast.embed.sources.coco import coco_rows
from lit_fast.embed.sources.columns import some
from lit_fast.embed.sources.image_paths import image_directory
from lit_fast.embed.sources.interface import Columns, Damage, Item, Layout, Skipped
from lit_fast.embed.sources.karpathy import is_karpathy, karpathy_rows
from lit_fast.embed.sources.table_entries import Entry, TableRow
from lit_fast.embed.sources.tables import table_rows
from lit_fast.errors import UserError, unreadable
from lit_fast.storage.files import open_read

_MAX_JSON = 2 << 30  # bytes; all captions of COCO are 0.1 GB


def read_json_file(path: str, options: Columns) -> Iterator[Item]:
    """Yield the rows of a JSON file; which format it has is decided by its keys.

    Of an object that has one list of objects, as TextCaps' `data`, this list is read.

    Raises:
      UserError: the file cannot be read, is too large, or has another format.
    """
    directory = image_directory(options, path)
    value = _load(path)
    if value is None:
        yield Damage(f"{path} is not JSON")
        return
    lists = {k: v for k, v in value.items() if _has_objects(v)} if isinstance(value, dict) else {}
    if "images" in lists and isinstance(value.get("annotations"), list):
        yield Layout("folder", images=directory)
        yield from coco_rows(path, directory, options, value["images"], value["annotations"])
    elif "images" in lists and is_karpathy(value["images"]):
        yield Layout("folder", images=directory)
        yield from karpathy_rows(path, directory, options, value["images"])
    elif isinstance(value, list) and _has_objects(value):
        yield from table_rows(path, options, _rows(value))
    elif len(lists) == 1:
        yield from table_rows(path, options, _rows(*lists.values()))
    else:
        found = f"an object of {some(value)}" if isinstance(value, dict) else "no list of objects"
        raise UserError(
            f"{path} holds {found}; give COCO's `images` with `annotations`, Karpathy's `images` with `sentences`, or "
            "a list of objects with an image and captions"
        )


def _rows(objects: list[Any]) -> Iterator[Entry]:
    for number, value in enumerate(objects, 1):
        if isinstance(value, dict):
            yield TableRow(number, value, unit="object")
        else:
            yield Skipped(f"object {number}", "not a JSON object")


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, dict) for part in value[:100])


def _load(path: str) -> Any:
    size, _ = size_and_etag(path)
    if size > _MAX_JSON:
        raise UserError(f"{path} has {size:,} bytes, but JSON above 2 GiB is not read; write it as .jsonl")
    with open_read(path) as file:
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError):
            return None
        except OSError as error:
            raise unreadable(path, error) from None
