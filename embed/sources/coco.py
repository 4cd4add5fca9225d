"""Read COCO's captions: one JSON and a directory of image files.

The format is "Caption Annotations" (cocodataset.org, "Data format").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lit_fast.embed.sources.columns import parse_row, require_column
from lit_fast.embed.sources.image_paths import find_image
from lit_fast.embed.sources.interface import Columns, Item, Skipped


def coco_rows(
    path: str, directory: str, options: Columns, images: list[Any], annotations: list[Any]
) -> Iterator[Item]:
    """Yield one row per image, with all its captions, in the order of the images' ids.

    Raises:
      UserError: there is no such column.
    """
    columns = _columns(path, options, images, annotations)
    by_image: dict[Any, list[dict[str, Any]]] = {}
    with_id = [i for i in images if isinstance(i, dict) and _is_id(i.get("id"))]
    yield from (Skipped("images", "image without an id") for _ in range(len(images) - len(with_id)))
    counts = Counter(image["id"] for image in with_id)
    for number, annotation in enumerate(annotations):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if _is_id(image_id) and image_id in counts:
            by_image.setdefault(image_id, []).append(annotation)
        else:
            yield Skipped(f"annotation {number}", "annotation of no image in the file")
    for image in sorted(with_id, key=lambda i: (isinstance(i["id"], str), i["id"])):
        if counts[image["id"]] > 1:
            yield Skipped(f"image {image['id']}", "several images with one id")
        else:
            yield _sample(directory, image, by_image.get(image["id"], []), columns)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


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
