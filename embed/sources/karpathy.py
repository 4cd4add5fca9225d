"""Read Karpathy's splits of COCO, Flickr8k and Flickr30k: `dataset_coco.json` and the like.

The file has `images`, each with `filename`, `split`, `sentences` with the captions in `raw`, and for COCO the directory
of the image in `filepath`. It mixes the splits, so one must be chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lit_fast.embed.sources.columns import find_guess, find_split, parse_row, require_column, some
from lit_fast.embed.sources.image_paths import find_image
from lit_fast.embed.sources.interface import Columns, Item, Skipped
from lit_fast.errors import UserError


def is_karpathy(images: list[Any]) -> bool:
    """Return whether the first of a file's `images` have sentences."""
    return any(isinstance(image, dict) and "sentences" in image for image in images[:100])


def karpathy_rows(path: str, directory: str, options: Columns, images: list[Any]) -> Iterator[Item]:
    """Yield one row per image of the chosen splits, in the order of the file.

    Raises:
      UserError: no split is chosen where there are several, or there is no such split or column.
    """
    rows = [image for image in images if isinstance(image, dict)]
    _check_split(path, options, rows)
    keys = list(dict.fromkeys(key for row in rows[:100] for key in row))
    columns = replace(
        options, captions=options.captions or (("", "sentences"),), image=options.image or "filename"
    )
    for name in (*columns.names(), columns.image):
        require_column(name, keys, f"{path}: images")
    yield from find_guess(options, columns, keys)
    yield from (Skipped("images", "image is not an object") for _ in range(len(images) - len(rows)))
    for number, row in enumerate(rows):
        filename, folder = row.get(columns.image), row.get("filepath")
        if problem := find_split(row, columns):
            yield Skipped(str(filename), problem)
        else:
            is_inside = isinstance(folder, str) and folder and isinstance(filename, str)
            image = find_image(directory, f"{folder}/{filename}" if is_inside else filename)
            yield image.item(parse_row(row, columns), f"image {number}")


def _check_split(path: str, options: Columns, rows: list[dict[str, Any]]) -> None:
    counts = Counter(str(row.get("split", "none")) for row in rows)
    shown = ", ".join(f"{some([split])} ({count:,})" for split, count in counts.most_common(10))
    if not options.split and len(counts) > 1:
        first = "train+restval" if "restval" in counts else counts.most_common(1)[0][0]
        raise UserError(
            f"{path} mixes the splits {shown}; choose with --split, as in --split {some([first])}"
        )
    if options.split and (absent := [split for split in options.split.split("+") if split not in counts]):
        raise UserError(f"{path} has no split {absent[0]!a}; choose from {shown}")
