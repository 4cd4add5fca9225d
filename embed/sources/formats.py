"""The table of source formats, and the functions that look a source up in it."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from lit_fast.data.dataset import Source
from lit_fast.data.images.noise import is_noise
from lit_fast.data.images.sources import size_and_etag
from lit_fast.embed.sources import folders, json_files, pairs, parquet, records, tables, tars
from lit_fast.embed.sources.clip_benchmark import lines_near
from lit_fast.embed.sources.interface import Columns, Format, Item, Layout, Sample
from lit_fast.embed.sources.text_lines import table_suffix
from lit_fast.embed.sources.text_tables import is_json_lines
from lit_fast.embed.sources.unread import unread_format
from lit_fast.errors import UserError
from lit_fast.storage.files import is_directory, open_read
from lit_fast.storage.paths import is_url, name, parent, suffix

NO_OPTIONS = Columns()
_RIEGELI = bytes.fromhex("83af70d10d884a3f")  # the beginning of an array_record
_POINTER = b"version https://git-lfs.github.com/"
_MAX_POINTER = 1024  # bytes
_MAX_NOISE = 1 << 20  # images


def read_noise(path: str, options: Columns) -> Iterator[Item]:
    """Read `noise:N`: yield N rows of uniform random noise, without captions.

    Raises:
      UserError: the number of images is 0 or too large, or `options` name columns.
    """
    if options.names() or options.image:
        raise UserError(f"{path} is noise and has no columns that options could name; leave them out")
    digits = path.partition(":")[2]
    count = int(digits) if len(digits) < 20 else _MAX_NOISE + 1
    if not 0 < count <= _MAX_NOISE:
        raise UserError(
            f"source {path} does not have 1 to {_MAX_NOISE:,} images; write for example noise:1024"
        )
    yield Layout("noise")
    for number in range(count):
        yield Sample(f"noise-{number}", number, 0, ())


FORMATS = {
    "tar": Format(tars.read_tar, (".tar",)),
    "parquet": Format(parquet.read_parquet, (".parquet", ".pq"), parquet.class_names, names_in_file=True),
    "table": Format(tables.read_table, (".csv", ".tsv", ".jsonl", ".ndjson")),
    "json": Format(json_files.read_json_file, (".json",)),
    "array_record": Format(records.read_records, (".array_record",), records.class_names),
    "tfrecord": Format(records.read_tfrecord, (".tfrecord", ".tfrecords", ".tfrec"), records.class_names),
    "folder": Format(folders.read_folder, class_names=lambda path, label: folders.class_folders(path)),
    "pairs": Format(pairs.read_pairs),
    "noise": Format(read_noise),
}

_BY_SUFFIX = {suffix: format for format, entry in FORMATS.items() for suffix in entry.suffixes}


def format_of(path: str, options: Columns = NO_OPTIONS) -> str:
    """Return the key in `FORMATS` of a file, directory or URL.

    It is decided by the suffix, else by the first bytes. A remote file without a suffix counts as a tar; the reader of
    tars reports if it is none. A URL that ends with a slash is a directory.

    Raises:
      UserError: the format is not known or not read, or the file cannot be read.
    """
    if is_noise(path):
        return "noise"
    local = not is_url(path)
    if is_directory(path) if local else path.endswith("/"):
        return "pairs" if pairs.has_pairs(path, options) else "folder"
    if by_name := format_by_name(path):
        return "table" if suffix(path) == ".json" and is_json_lines(path) else by_name
    if table_suffix(path) == ".txt":  # only where it is named: other programs write them beside images
        return "table"
    if not local:
        if problem := unread_format(path):
            raise UserError(f"{path} {problem}")
        return "tar"
    return _format_by_content(path)


def format_by_name(path: str) -> str:
    """Return the format of the suffix of a path or URL, "" for an unknown one."""
    if found := re.search(r"\.(array_record|tfrecord)-\d+-of-\d+$", name(path).lower()):
        return found[1]  # TFDS: .tfrecord-00000-of-00004
    is_table = _BY_SUFFIX.get(table_suffix(path)) == "table"
    return "table" if is_table else _BY_SUFFIX.get(suffix(path), "")


def refuse_pointer(source: Source) -> None:
    """Raise UserError if a local file is a pointer of Git LFS, as a clone without `git lfs pull` has them."""
    if 0 < source.bytes < _MAX_POINTER and not is_url(source.path):
        with open_read(source.path) as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"{source.path} is a pointer of Git LFS and not the file; get it with: git lfs pull"
                )


class OwnClassNames(NamedTuple):
    """What a directory of sources says about its classes."""

    path: str  # the first source of the directory
    keys: tuple[str, ...]  # class names by the format: names of folders, of a parquet's ClassLabel, ...
    classnames: tuple[str, ...]  # lines of classnames.txt
    templates: tuple[str, ...]  # lines of zeroshot_classification_templates.txt


def own_class_names(sources: Sequence[Source]) -> list[OwnClassNames]:
    """Return what each directory of sources says about its classes.

    The files are beside a source or one level up, as CLIP_benchmark has them. The first source of a directory counts,
    and local files with other class names inside; `kind` of each source must be the name of its format.
    """
    first: dict[tuple[str, tuple[str, ...]], Source] = {}
    names: dict[str, tuple[str, ...]] = {}  # by directory
    for source in sources:
        directory, format = _directory(source), FORMATS[source.kind]
        if directory not in names or (format.names_in_file and not is_url(source.path)):
            label = next((n.removeprefix("label=") for n in source.names if n.startswith("label=")), "")
            names[directory] = format.class_names(source.path, label)
        first.setdefault((directory, names[directory]), source)
    return [
        OwnClassNames(
            source.path,
            keys,
            lines_near(directory, "classnames.txt"),
            tuple(filter(None, lines_near(directory, "zeroshot_classification_templates.txt"))),
        )
        for (directory, keys), source in first.items()
    ]


def _directory(source: Source) -> str:
    if source.kind == "noise":  # there is no file
        return ""
    return source.path if source.kind in ("folder", "pairs") else parent(source.path)


def _format_by_content(path: str) -> str:
    size_and_etag(path)  # refuses what is not a regular file
    with open_read(path) as file:
        start = file.read(tarfile.BLOCKSIZE)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(_RIEGELI):
        return "array_record"
    if records.is_tfrecord(start):
        return "tfrecord"
    with suppress(tarfile.HeaderError, ValueError):
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
        return "tar"
    if not start.strip(b"\0"):
        raise UserError(f"{path} is empty; give a file with data")
    problem = unread_format(path, start) or (
        f"begins with {start[:20]!a}, which is no known format; give a file of {', '.join(_BY_SUFFIX)}"
    )
    raise UserError(f"{path} {problem}")
