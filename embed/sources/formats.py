"""The table of source formats, and how the format of a file is recognised."""

from __future__ import annotations

import re

from lit_fast.data.images.noise import is_noise
from lit_fast.embed.sources import coco, folders, noise, parquet, records, tables, tars
from lit_fast.embed.sources.interface import Format
from lit_fast.storage.files import is_directory, open_read
from lit_fast.storage.paths import is_url, name, suffix

FORMATS = {
    "tar": Format(tars.read_tar, (".tar",)),
    "parquet": Format(parquet.read_parquet, (".parquet", ".pq"), parquet.class_names),
    "table": Format(tables.read_table, (".csv", ".tsv", ".jsonl", ".ndjson")),
    "coco": Format(coco.read_coco, (".json",)),
    "array_record": Format(records.read_records, (".array_record",), records.class_names),
    "folder": Format(folders.read_folder, class_names=folders.class_folders),
    "noise": Format(noise.read_noise),
}

_BY_SUFFIX = {suffix: format for format, entry in FORMATS.items() for suffix in entry.suffixes}


def format_of(path: str) -> str:
    """Return the key in `FORMATS` of a file, directory or URL: by its suffix, else by its first bytes.

    An unknown file counts as a tar; the reader of tars reports that it is none.
    """
    if is_noise(path):
        return "noise"
    local = not is_url(path)
    if local and is_directory(path):
        return "folder"
    if by_name := format_by_name(path):
        return by_name
    return "parquet" if local and _first_bytes(path) == b"PAR1" else "tar"


def format_by_name(path: str) -> str:
    """Return the format that belongs to the suffix of a path or URL, "" for an unknown suffix."""
    if re.search(
        r"\.array_record-\d+-of-\d+$", name(path).lower()
    ):  # TFDS: train.array_record-00000-of-00004
        return "array_record"
    return _BY_SUFFIX.get(suffix(path), "")


def _first_bytes(path: str) -> bytes:
    try:
        with open_read(path) as file:
            return file.read(4)
    except OSError:
        return b""
