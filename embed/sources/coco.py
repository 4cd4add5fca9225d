"""Reads COCO's captions: one JSON with `images` and `annotations`, beside a directory of image files.

The format is COCO's "Caption Annotations" (cocodataset.org, "Data format").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lit_fast.data.images.sources import size_and_etag
from lit_fast.embed.sources.fields import Fields, require, texts
from lit_fast.embed.sources.items import Damage, Item, Layout, LeftOut, Names, Sample
from lit_fast.embed.sources.paths import file_size, image_directory, inside
from lit_fast.errors import UserError
from lit_fast.storage.read import open_binary

MAX_JSON = 2 << 30  # bytes; all captions of COCO are 0.1 GB


def read_coco(path: str, names: Names) -> Iterator[Item]:
    """One row per image, with all its captions, in the order of the images' ids.

    Raises:
      UserError: the file cannot be read, is too large, or is another JSON.
    """
    if names.key:
        raise UserError(f"{path}: --key is not for COCO, where the path is the key; leave it out")
    directory = image_directory(names.images, path)
    yield Layout("folder", images=directory)
    value = _load(path)
    if value is None:
        yield Damage(f"{path} is not JSON")
        return
    images, annotations = (
        value.get(n) if isinstance(value, dict) else None for n in ("images", "annotations")
    )
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(f"{path} is not in COCO's format: it needs the lists `images` and `annotations`")
    captions: dict[Any, list[dict[str, Any]]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            captions.setdefault(annotation["image_id"], []).append(annotation)
    column, fields = _fields(path, names, images, annotations)
    rows = [i for i in images if isinstance(i, dict) and isinstance(i.get("id"), int | str)]
    if len(rows) < len(images):
        yield LeftOut("images", "image without an id")
    for image in sorted(rows, key=lambda i: (isinstance(i["id"], str), i["id"])):
        yield _sample(directory, image, captions.get(image["id"], []), column, fields)


def _sample(
    directory: str, image: dict[str, Any], annotations: list[dict[str, Any]], column: str, fields: Fields
) -> Item:
    inner, problem = inside(directory, image.get(column))
    size = 0
    if not problem:
        size, problem = file_size(directory, inner)
    # The annotations of one image as one row: each named field a list of the values.
    values: dict[str, Any] = {name: [a.get(name) for a in annotations] for name in fields.columns()}
    if fields.label:
        labels = {v for v in values[fields.label] if isinstance(v, int)}
        values[fields.label] = next(iter(labels)) if len(labels) == 1 else image.get(fields.label)
    if fields.language:
        values[fields.language] = [v if isinstance(v, str) else "" for v in values[fields.language]]
    captions, languages, label, wrong = texts(values, fields)
    if problem or wrong:
        return LeftOut(inner or f"image {image['id']}", problem or wrong)
    return Sample(inner, 0, size, captions, label, languages)


def _fields(path: str, names: Names, images: list[Any], annotations: list[Any]) -> tuple[str, Fields]:
    """The key of the file's name in an image, and those in an annotation."""
    columns = list(next((i for i in images if isinstance(i, dict)), {}))
    require(names.image, columns, f"{path}: images")
    columns = list(next((a for a in annotations if isinstance(a, dict)), {}))
    captions = names.captions or (("", "caption"),)
    for name in [*(n for _, n in captions), names.label, names.language]:
        if annotations:
            require(name, columns, f"{path}: annotations")
    return names.image or "file_name", Fields("", captions, "", names.label, names.language)


def _load(path: str) -> Any:
    size, _ = size_and_etag(path)
    if size > MAX_JSON:
        raise UserError(f"{path} has {size} bytes; JSON above 2 GiB is not read: make it a .jsonl")
    with open_binary(path) as file:
        try:
            return json.loads(file.read())
        except (ValueError, RecursionError):
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
