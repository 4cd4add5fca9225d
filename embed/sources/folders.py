"""Read a directory with a folder of images per class.

The layout is that of ImageNet's `val/n01440764/x.JPEG`. The number of a class is the rank of its folder among the
sorted names.
"""

from __future__ import annotations

from collections.abc import Iterator

from lit_fast.embed.sources.columns import ParsedRow
from lit_fast.embed.sources.image_paths import find_image
from lit_fast.embed.sources.interface import (
    IMAGE_SUFFIXES,
    Columns,
    Item,
    Layout,
    is_utf8,
)
from lit_fast.errors import UserError
from lit_fast.storage.files import list_directories, walk_files
from lit_fast.storage.paths import join, suffix


def class_folders(path: str) -> tuple[str, ...]:
    """Return the names of the classes' folders, in the order of the class numbers."""
    try:
        names = [name for name in list_directories(path) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for name in names:
        if not is_utf8(name):
            raise UserError(f"{path}: the name of the folder {name!a} is not UTF-8; rename it")
    return tuple(names)


def read_folder(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per image file, at any depth below its class.

    Links to directories are not followed.

    Raises:
      UserError: a directory cannot be read, or `options` name columns.
    """
    if options != Columns(images=options.images):
        raise UserError(
            f"{path} is a directory of classes and has no columns that options could name; leave them out"
        )
    yield Layout("folder", images=path)
    for label, folder in enumerate(class_folders(path)):
        try:
            for file in walk_files(join(path, folder)):
                if suffix(file) in IMAGE_SUFFIXES:
                    yield find_image(path, join(folder, file)).item(ParsedRow(label=label))
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
