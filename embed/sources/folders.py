"""Read a directory with a folder of images per class.

The layout is that of ImageNet's `val/n01440764/x.JPEG`. The number of a class is the rank of its folder among the
sorted names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lit_fast.embed.sources.columns import ParsedRow, some
from lit_fast.embed.sources.image_paths import find_image
from lit_fast.embed.sources.interface import (
    IMAGE_SUFFIXES,
    JUNK,
    NO_IMAGE_FILE,
    Columns,
    Item,
    Layout,
    Note,
    Skipped,
    is_utf8,
)
from lit_fast.errors import UserError, unreadable
from lit_fast.storage.files import file_sizes, is_directory, list_directories, list_names, walk_files
from lit_fast.storage.paths import is_junk, is_url, join, suffix


def class_folders(path: str) -> tuple[str, ...]:
    """Return the names of the classes' folders, in the order of the class numbers."""
    try:
        names = [name for name in list_directories(path) if not is_junk(name)]
    except OSError as error:
        raise unreadable(path, error) from None
    for name in names:
        if not is_utf8(name):
            raise UserError(f"{path}: the name of the folder {name!a} is not UTF-8; rename it")
    return tuple(names)


def read_folder(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per image file, at any depth below its class, and every other file as skipped.

    Links to directories below a class are not followed.

    Raises:
      UserError: a directory cannot be read, or `options` name columns.
    """
    if options.split:
        raise UserError(f"{path} is a directory of classes and has no splits; leave --split out")
    if options.names() or options.image:
        raise UserError(
            f"{path} is a directory of classes and has no columns that options could name; leave them out"
        )
    yield Layout("folder", images=path.rstrip("/") if is_url(path) else path)
    numbers = {folder: number for number, folder in enumerate(class_folders(path))}
    inside: dict[str, set[str]] = {folder: set() for folder in numbers}  # class -> places of its images
    sizes = file_sizes(path) if is_url(path) else None
    try:
        for entry in list_names(path) if sizes is None else dict.fromkeys(n.partition("/")[0] for n in sizes):
            for file in _files(path, entry, sizes):
                if is_junk(file):
                    yield Skipped(file, JUNK)
                elif suffix(file) not in IMAGE_SUFFIXES:
                    yield Skipped(file, NO_IMAGE_FILE)
                elif entry not in numbers:
                    yield Skipped(file, "image beside the class folders")
                else:
                    inside[entry].add(file.split("/")[1] if file.count("/") > 1 else "")
                    yield find_image(path, file, sizes=sizes).item(ParsedRow(label=numbers[entry]))
    except OSError as error:
        raise unreadable(error.filename, error) from None
    yield from _notes(path, inside)


def _files(path: str, entry: str, sizes: Mapping[str, int] | None) -> Iterator[str]:
    if sizes is not None:
        yield from (name for name in sizes if name.partition("/")[0] == entry)
        return
    if not is_directory(join(path, entry)):
        yield entry
        return
    try:
        for file in walk_files(join(path, entry)):
            yield join(entry, file)
    except OSError:
        if not is_junk(entry):
            raise
        yield entry  # lost+found belongs to root


def _notes(path: str, inside: dict[str, set[str]]) -> Iterator[Note]:
    if empty := [folder for folder, places in inside.items() if not places]:
        yield Note(
            f"{path} has {len(empty)} class folders without an image, which are classes: {some(empty)}"
        )
    if len(used := [folder for folder, places in inside.items() if places]) == 1:
        yield Note(f"{path} has images of one class only, the folder {used[0]}")
    for folder, places in inside.items():
        nested = sorted(places - {""})
        if len(nested) > 1:
            yield Note(
                f"the folders in {join(path, folder)} ({some(nested)}) are not classes of their own: "
                f"their images are of the class {folder}"
            )
            return
