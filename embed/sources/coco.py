"""Read COCO's captions: one JSON and a directory of image files.

The format is "Caption Annotations" (cocodataset.org, "Data format").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lit_fast.data.images.sources import size_and_etag
from lit_fast.embed.sources.columns import parse_row, require_column
from lit_fast.embed.sources.image_paths import find_image, image_directory
from lit_fast.embed.sources.interface import Columns, Damage, Item, Layout, Skipped
from lit_fast.errors import UserError, os_reason
from lit_fast.storage.files import open_read

_MAX_JSON = 2 << 30  # bytes; all captions of COCO are 0.1 GB


def read_coco(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per image, with all its captions, in the order of the images' ids.

    Raises:
      UserError: the file cannot be read, is too large, or is another JSON.
    """
    directory = image_directory(options, path)
    yield Layout("folder", images=directory)
    value = _load(path)
    if value is None:
        yield Damage(f"{path} is not JSON")
        return
    images, annotations = (
        value.get(n) if isinstance(value, dict) else None for n in ("images", "annotations")
    )
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(
            f"{path} is not in COCO's format, which has the lists `images` and `annotations`; give another file"
        )
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    columns = _columns(path, options, images, annotations)
    with_id = [i for i in images if isinstance(i, dict) and isinstance(i.get("id"), int | str)]
    if len(with_id) < len(images):
        yield Skipped("images", "image without an id")
    for image in sorted(with_id, key=lambda i: (isinstance(i["id"], str), i["id"])):
        yield _sample(directory, image, by_image.get(image["id"], []), columns)


def _sample(
    directory: str, image: dict[str, Any], annotations: list[dict[str, Any]], columns: Columns
) -> Item:
    # The annotations of one image as one row: each column has the list of their values.
    values: dict[str, Any] = {name: [a.get(name) for a in annotations] for name in columns.names()}
    if columns.label:
        labels = {v for v in values[columns.label] if isinstance(v, int)}
        values[columns.label] = next(iter(labels)) if len(labels) == 1 else image.get(columns.label)
    if columns.language:
        values[columns.language] = [v if isinstance(v, str) else "" for v in values[columns.language]]
    found = find_image(directory, image.get(columns.image))
    return found.item(parse_row(values, columns), f"image {image['id']}")


def _columns(path: str, options: Columns, images: list[Any], annotations: list[Any]) -> Columns:
    """Choose the key of the file's name in an image, the others in an annotation."""
    keys = list(next((i for i in images if isinstance(i, dict)), {}))
    require_column(options.image, keys, f"{path}: images")
    keys = list(next((a for a in annotations if isinstance(a, dict)), {}))
    captions = options.captions or (() if "captions" in options.declined else (("", "caption"),))
    columns = replace(options, captions=captions, image=options.image or "file_name")
    for name in columns.names() if annotations else ():
        require_column(name, keys, f"{path}: annotations")
    return columns


def _load(path: str) -> Any:
    size, _ = size_and_etag(path)
    if size > _MAX_JSON:
        raise UserError(f"{path} has {size} bytes; JSON above 2 GiB is not read: make it a .jsonl")
    with open_read(path) as file:
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError):
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {os_reason(error)}") from None
