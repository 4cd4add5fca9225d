"""Reads a directory with a folder of images per class, like ImageNet's `val/n01440764/x.JPEG`.

The number of a class is the rank of its folder among the sorted names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from lit_fast.embed.sources.items import IMAGE_SUFFIXES, Item, Layout, LeftOut, Names, Sample, is_text
from lit_fast.embed.sources.paths import file_size, inside
from lit_fast.errors import UserError


def class_folders(path: str) -> tuple[str, ...]:
    """The names of the classes' folders, in the order of their numbers."""
    try:
        with os.scandir(path) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for name in names:
        if not is_text(name):
            raise UserError(f"{path}: the name of the folder {name!a} is not UTF-8; rename it")
    return tuple(names)


def read_folder(path: str, names: Names) -> Iterator[Item]:
    """One row per image file, at any depth below its class; links to directories are not followed.

    Raises:
      UserError: a directory cannot be read, or `names` asks for columns.
    """
    if names != Names(images=names.images):
        raise UserError(f"{path} is a directory of classes: it has no columns that options could name")
    yield Layout("folder", images=path)
    for label, folder in enumerate(class_folders(path)):
        for directory, folders, files in os.walk(os.path.join(path, folder), onerror=_refuse):
            folders.sort()
            for file in sorted(files):
                if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                    yield _sample(path, os.path.relpath(os.path.join(directory, file), path), label)


def _sample(path: str, name: str, label: int) -> Item:
    inner, problem = inside(path, name)
    size = 0
    if not problem:
        size, problem = file_size(path, inner)
    return LeftOut(inner, problem) if problem else Sample(inner, 0, size, (), label)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read: {error.strerror}")
