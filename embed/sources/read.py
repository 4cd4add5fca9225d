"""Reads any source: the reader of its format, and the class names and templates that lie beside it."""

from __future__ import annotations

from collections.abc import Iterator

from lit_fast.embed.sources.expand import format_of
from lit_fast.embed.sources.items import Item, Names
from lit_fast.storage.read import beside, folder


def read_source(path: str, names: Names) -> Iterator[Item]:
    """The items of a source, lazily.

    Raises:
      UserError: it cannot be read at all, or `names` names something that it lacks.
    """
    match format_of(path):
        case "noise":
            from lit_fast.embed.sources.noise import read_noise

            return read_noise(path, names)
        case "parquet":
            from lit_fast.embed.sources.parquet import read_parquet

            return read_parquet(path, names)
        case "table":
            from lit_fast.embed.sources.tables import read_table

            return read_table(path, names)
        case "coco":
            from lit_fast.embed.sources.coco import read_coco

            return read_coco(path, names)
        case "folder":
            from lit_fast.embed.sources.folders import read_folder

            return read_folder(path, names)
        case "array_record":
            from lit_fast.embed.sources.records import read_records

            return read_records(path, names)
        case _:
            from lit_fast.embed.sources.tars import read_tar

            lines = lines_near(_home(path), "dataset_type.txt") == ("retrieval",)
            return read_tar(path, names, lines=lines)


def class_names(paths: list[str]) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The pairs of class names and prompt templates that the sources have, one per directory at most.

    `classnames.txt` and `zeroshot_classification_templates.txt` beside a source or one level up, as
    CLIP_benchmark has them; without, the names that the format itself gives in a directory's first file.
    """
    first: dict[str, str] = {}
    for path in paths:
        first.setdefault(_home(path), path)
    return {
        (
            lines_near(home, "classnames.txt") or _own_names(path),
            tuple(filter(None, lines_near(home, "zeroshot_classification_templates.txt"))),
        )
        for home, path in first.items()
    }


def lines_near(directory: str, name: str) -> tuple[str, ...]:
    """The lines of a file in a directory or one level up; empty ones only between others."""
    text = beside(directory, name)
    if text is None:
        text = beside(folder(directory), name)
    return tuple(line.strip() for line in (text or "").rstrip().splitlines())


def _home(path: str) -> str:
    return path if format_of(path) == "folder" else folder(path)


def _own_names(path: str) -> tuple[str, ...]:
    match format_of(path):
        case "parquet":
            from lit_fast.embed.sources import parquet

            return parquet.class_names(path)
        case "folder":
            from lit_fast.embed.sources.folders import class_folders

            return class_folders(path)
        case "array_record":
            from lit_fast.embed.sources import records

            return records.class_names(path)
        case _:
            return ()
