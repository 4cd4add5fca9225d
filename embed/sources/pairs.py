"""Read a directory of image files with their texts beside them, flat or nested.

The layout is that of img2dataset's `files` output: `00000/000000000.jpg`, `.txt` and `.json`. The files of a row are
those in one directory whose names are equal up to the last dot: `a.b.jpg` belongs to `a.b.txt`, not to `a.txt`. The
text of `a.jpg` may also be `a.jpg.txt`. A `.txt` or `.caption` is one caption, whatever lines it has. A `.json` is an
object; by default its `captions` or `caption` are taken before the `.txt`. A `.cls` is a class number.

img2dataset's logs, `00000.parquet` and `00000_stats.json` beside the directory `00000`, are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from lit_fast.embed.sources.columns import (
    CAPTIONS,
    NO_TEXT,
    ParsedRow,
    choose_columns,
    nested_names,
    parse_row,
    some,
    value_of,
)
from lit_fast.embed.sources.image_paths import find_image
from lit_fast.embed.sources.interface import (
    IMAGE_SUFFIXES,
    JUNK,
    Columns,
    Guess,
    Item,
    Layout,
    Note,
    Skipped,
)
from lit_fast.errors import UserError, unreadable
from lit_fast.storage.files import (
    file_sizes,
    file_status,
    is_directory,
    list_directories,
    read_range,
    read_whole,
    walk_directories,
)
from lit_fast.storage.paths import is_junk, is_url, join, stem, suffix
from lit_fast.storage.paths import name as name_of

TEXT_SUFFIXES = (".txt", ".caption", ".json", ".cls")
NO_IMAGE = "text without an image of the same name"
OTHER_FILE = "file that is no image, .txt, .caption, .json or .cls"
LINK = "link to a directory, which is not followed"
NO_JSON = ".json is not a JSON object"
_NUMBERS = re.compile(r"[-+\d\s.,;:]+")
_MAX_TEXT = 1 << 20  # bytes of one file
_MAX_JSONS = 100  # that are opened to find one with a caption


def has_pairs(path: str, options: Columns) -> bool:
    """Return whether any image below a directory has a `.txt`, a `.cls` or a `.json` with a caption beside it.

    At most 100 `.json` files are opened. Where `options` name columns, any `.json` counts. Where they decline captions,
    there are no pairs.

    Raises:
      UserError: a directory cannot be read.
    """
    if "captions" in options.declined:
        return False
    opened = 0
    try:
        for directory, names in walk_directories(path):
            texts = [name for name in names if suffix(name) in TEXT_SUFFIXES and not is_junk(name)]
            if not texts or is_junk(directory):
                continue
            images = {s for name in names if suffix(name) in IMAGE_SUFFIXES for s in (name, stem(name))}
            for text in texts:
                if stem(text) not in images:
                    continue
                if suffix(text) != ".json" or options.names():
                    return True
                if opened < _MAX_JSONS:
                    opened += 1
                    values, _ = parse_texts({".json": _read_text(join(path, directory, text))[0]})
                    if choose_columns(Columns(), nested_names([values]), path, image=False).captions:
                        return True
    except OSError as error:
        raise unreadable(error.filename, error) from None
    return False


def read_pairs(path: str, options: Columns) -> Iterator[Item]:
    """Yield one row per image file, and every file that is no part of a row as skipped.

    Links to directories are not followed.

    Raises:
      UserError: a directory cannot be read, no row has a named column, or `options` name a key.
    """
    if options.key:
        raise UserError(
            f"{path}: --key is not for image files, where the path is the key; leave it out or give --key ''"
        )
    yield Layout("folder", images=path.rstrip("/") if is_url(path) else path)
    if not options.captions:
        yield Guess("image-text pairs (for one class per folder give --captions '')")
    try:
        yield from _PairReader(path, options).read()
    except OSError as error:
        raise unreadable(error.filename, error) from None


def parse_texts(texts: dict[str, bytes]) -> tuple[dict[str, Any], bool]:
    """Return the fields of a `.json` with the other texts by suffix, and whether the `.json`, if any, is an object."""
    value: Any = {}
    if ".json" in texts:
        try:
            value = json.loads(texts[".json"])
        except (ValueError, RecursionError):
            value = None
    values = value if isinstance(value, dict) else {}
    others = {s[1:]: text.removeprefix(b"\xef\xbb\xbf") for s, text in texts.items() if s != ".json"}
    return values | others, isinstance(value, dict)


def text_columns(path: str, options: Columns, values: dict[str, Any]) -> Columns:
    """Return the named columns of the texts of a row; by default the first for captions with a text, and `cls`."""
    captions = options.captions
    is_guessed = not captions and "captions" not in options.declined
    for name in dict.fromkeys(("captions", "caption", "txt", *CAPTIONS)) if is_guessed else ():
        row = parse_row(values, Columns(captions=(("", name),)))
        if row.captions or (row.problem != NO_TEXT and not captions):
            captions = (("", name),)
        if row.captions:
            break
    if not captions:
        unnamed = Columns(declined=options.declined)
        captions = choose_columns(unnamed, nested_names([values]), path, image=False).captions
    is_label = "cls" in values and "label" not in options.declined
    return replace(options, captions=captions, label=options.label or ("cls" if is_label else ""))


class _PairReader:
    def __init__(self, path: str, options: Columns) -> None:
        self._path, self._options = path, options
        self._sizes = file_sizes(path) if is_url(path) else None
        self._images = (f".{options.image.lower().lstrip('.')}",) if options.image else IMAGE_SUFFIXES
        self._logs = set[str]()
        for folder in list_directories(path):
            self._logs |= {f"{folder}.parquet", f"{folder}_stats.json"}
        self._names: dict[str, None] = {}  # of the values of all rows, in order
        self._guessed = {""}  # captions
        self._unused: set[str] = set()  # suffixes of files beside the images
        self._several_lines = 0  # captions
        self._numbers = ""  # the first caption, while all are numbers
        self._captions = 0
        self._texts: dict[str, int] = {}  # directory directly below `path` with images -> images with texts

    def read(self) -> Iterator[Item]:
        for directory, names in walk_directories(self._path):
            files = (join(directory, name) for name in sorted(names, key=_row_name))
            for _, group in groupby(files, _row_name):
                yield from self._row(list(group))
        if self._names:
            # This refuses a name that no row has.
            choose_columns(self._options, list(self._names), self._path, image=False)
        yield from (Note(f"{self._path}: {note}") for note in self._notes())

    def _row(self, files: list[str]) -> Iterator[Item]:
        """Yield the row of files with one stem, and those that are no part of it."""
        images, texts, others = list[str](), list[str](), list[str]()
        for file in files:
            if is_junk(file):
                yield Skipped(file, JUNK)
            elif suffix(file) in self._images:
                images.append(file)
            elif suffix(file) in TEXT_SUFFIXES:
                texts.append(file)
            elif file not in self._logs:
                others.append(file)
        if images:
            self._unused.update(suffix(file) or "no suffix" for file in others)
        else:
            for file in others:
                yield Skipped(
                    file, LINK if self._sizes is None and is_directory(join(self._path, file)) else OTHER_FILE
                )
        names = [name_of(file) for file in images]
        own = [t for t in texts if images and (stem(t) in names or suffix(stem(t)) not in IMAGE_SUFFIXES)]
        yield from (Skipped(file, NO_IMAGE) for file in texts if file not in own and file not in self._logs)
        if len(images) > 1:
            shown = " and ".join(sorted({suffix(file) for file in images}))
            for file in images:
                yield Skipped(file, f"several images of one name ({shown}); choose with --image")
        elif images:
            [image] = images
            row, captions = self._parse(own)
            folder = image.partition("/")[0] if "/" in image else ""
            self._texts[folder] = self._texts.get(folder, 0) + bool(own)
            if captions not in self._guessed and not self._options.captions:
                self._guessed.add(captions)
                yield Guess(f"captions = {captions}")
            yield find_image(self._path, image, sizes=self._sizes).item(row, image)

    def _parse(self, files: list[str]) -> tuple[ParsedRow, str]:
        """Return the row of some text files, and the name of the guessed column of its captions."""
        texts: dict[str, bytes] = {}
        for file in files:
            if suffix(file) in texts:
                return ParsedRow(problem=f"several {suffix(file)} of one name"), ""
            texts[suffix(file)], problem = _read_text(join(self._path, file))
            if problem:
                return ParsedRow(problem=f"{suffix(file)} {problem}"), ""
        values, is_object = parse_texts(texts)
        if self._options.names():
            self._names |= dict.fromkeys(nested_names([values]))
        columns = text_columns(self._path, self._options, values)
        row = parse_row(values, columns)
        if not is_object and (
            row.problem == NO_TEXT or any(value_of(values, n) is None for n in columns.names())
        ):
            row = ParsedRow(problem=NO_JSON)
        captions = some([name for _, name in columns.captions]) if columns.captions and row.captions else ""
        for text in row.captions:
            is_number = _NUMBERS.fullmatch(text) and (self._numbers or not self._captions)
            self._numbers = (self._numbers or text) if is_number else ""
            self._captions += 1
        self._several_lines += captions == "txt" and "\n" in row.captions[0]
        return row, captions

    def _notes(self) -> Iterator[str]:
        if self._numbers:
            yield f"all captions are numbers ({self._numbers[:40]!a}), as of boxes; give --captions '' to ignore them"
        if self._several_lines:
            yield f"{self._several_lines:,} .txt files have several lines; each file is one caption"
        if self._unused:
            yield f"files with {some(sorted(self._unused))} beside the images are not used"
        without = [folder for folder, count in self._texts.items() if not count]
        if without and len(without) < len(self._texts):
            names = some([folder or "this directory" for folder in without])
            yield f"no image in {names} has a text; if these are classes, index them apart with --captions ''"


def _row_name(file: str) -> str:
    """Return what the files of a row have in common: "a" of `a.jpg`, `a.txt` and `a.jpg.txt`."""
    base = stem(file)
    return stem(base) if suffix(file) in TEXT_SUFFIXES and suffix(base) in IMAGE_SUFFIXES else base


def _read_text(location: str) -> tuple[bytes, str]:
    """Return the content of a text file, and why it cannot be used."""
    if is_url(location):
        try:
            data = read_whole(location, _MAX_TEXT)
        except UserError as error:
            return b"", f"cannot be read ({error})"
        return (b"", "is missing") if data is None else (data, "")
    try:
        status = file_status(location)  # before opening: a pipe would block
        if not status.is_file:
            return b"", "is not a regular file"
        if status.size > _MAX_TEXT:
            return b"", "above 1 MiB"
        return read_range(location, 0, status.size), ""
    except OSError as error:
        return b"", f"cannot be read ({error.strerror})"
