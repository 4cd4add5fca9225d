"""Look at a directory that holds image files: what is it, and is it plausible?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from lit_fast.embed.sources.columns import some
from lit_fast.embed.sources.interface import IMAGE_SUFFIXES, Columns
from lit_fast.embed.sources.pairs import TEXT_SUFFIXES, has_pairs
from lit_fast.embed.sources.unread import unread_format
from lit_fast.errors import UserError, unreadable
from lit_fast.storage.files import open_read, walk_directories
from lit_fast.storage.paths import is_junk, join, name, parent, stem, suffix

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of Hugging Face's image folders
_SPLITS = {"train", "test", "val", "valid", "validation", "dev"}
_CAPTIONS_FILE = re.compile(r"(captions|dataset)_.*\.json", re.IGNORECASE)  # COCO's, Karpathy's
_LISTS_IMAGES = re.compile(rb'"(image|file_?name|filepath|image_path)"')
_HEAD = 1 << 16  # bytes of a .json
_MAX_NAMES = 10_000  # of images and of texts that are compared


class _Contents:
    """The files below a directory."""

    def __init__(self, directory: str) -> None:
        self.at_top = False  # images
        self.folders: dict[str, None] = {}  # directly in the directory, with images
        self.tables: list[str] = []
        self.others: Counter[str] = Counter()  # suffixes of other files
        self.images: set[str] = set()  # names of the first images without suffix
        self.jsons: list[str] = []  # not beside images
        self.texts: dict[str, str] = {}  # names of the first texts without suffix -> folder
        for folder, names in walk_directories(directory):
            files = [file for file in names if not is_junk(join(folder, file))]
            images = [stem(file) for file in files if suffix(file) in IMAGE_SUFFIXES]
            top = folder.partition("/")[0]
            if images and top:
                self.folders[top] = None
            self.at_top |= bool(images) and not top
            if len(self.images) < _MAX_NAMES:
                self.images.update(images)
            for file in files:
                if suffix(file) in IMAGE_SUFFIXES:
                    continue
                self.others[suffix(file) or file] += 1
                if not images and suffix(file) == ".json" and len(self.jsons) < 100:
                    self.jsons.append(join(folder, file))
                if top and suffix(file) in TEXT_SUFFIXES and len(self.texts) < _MAX_NAMES:
                    self.texts.setdefault(stem(file), top)
            self.tables += [join(directory, folder, table) for table in _METADATA if table in names]


def image_sources(directory: str) -> list[str]:
    """Return a directory of images, or the tables of Hugging Face's image folders that are deep in it.

    Raises:
      UserError: it holds no images, or images that are neither beside texts nor plausibly in a folder per class.
    """
    try:
        contents = _Contents(directory)
    except OSError as error:
        raise unreadable(error.filename, error) from None
    if contents.tables:
        refuse_several_splits(directory, {name(parent(table)) for table in contents.tables})
        return contents.tables
    if contents.folders or contents.at_top:
        problem = _doubt(directory, contents)
        if problem and not has_pairs(directory, Columns()):
            raise UserError(f"source {directory} {problem}")
        return [directory]
    common = contents.others.most_common(20)
    if common and (problem := unread_format(f"x{common[0][0]}")):
        raise UserError(f"source {directory} has {common[0][0]} files; such a file {problem}")
    found = f"only {some([kind for kind, _ in common])}" if common else "no files"
    raise UserError(
        f"source {directory} has {found}; give .tar, .parquet, .csv, .tsv, .jsonl, .tfrecord or .array_record files, "
        "images with texts beside them, or a folder of images per class"
    )


def refuse_several_splits(directory: str, folders: Collection[str]) -> None:
    """Raise UserError if folders are named after several splits, as `train` and `val` or `train2017` and `val2017`."""
    if len({re.sub(r"[\d_-]+$", "", folder.lower()) for folder in folders} & _SPLITS) > 1:
        raise UserError(f"source {directory} holds the splits {', '.join(sorted(folders))}; name one of them")


def _doubt(directory: str, contents: _Contents) -> str:
    """Return why the folders of a directory are not classes, and an action; "" if they may be."""
    if not contents.folders:
        return (
            "holds images without texts beside them and without a folder per class; give a table that names them, or "
            "a directory of class folders"
        )
    refuse_several_splits(directory, contents.folders)
    is_single = len(contents.folders) == 1
    where = some(list(contents.folders))
    for file in contents.jsons:
        if (is_single or _CAPTIONS_FILE.fullmatch(name(file))) and _lists_images(join(directory, file)):
            return f"holds images in {where} and {file}; give {join(directory, file)}, with --images for its images"
    if not is_single:
        return ""
    if where.lower() in _SPLITS:
        return f"holds the split {where} only; give {join(directory, where)}"
    folder = next((f for text, f in contents.texts.items() if text in contents.images and f != where), "")
    if not folder:
        return ""
    return f"holds images in {where} and texts of the same names in {folder}; put each text beside its image"


def _lists_images(location: str) -> bool:
    try:
        with open_read(location) as file:
            return _LISTS_IMAGES.search(file.read(_HEAD)) is not None
    except (OSError, UserError):
        return False
