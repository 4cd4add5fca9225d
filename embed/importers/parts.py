"""The files of features as other programs write them, in their order.

| format | files | captions beside them |
|---|---|---|
| clip-retrieval | `DIR/img_emb/img_emb_0.npy`, ... | `DIR/metadata/metadata_0.parquet`, ..., a row each |
| npy | `.npy` files: `[n, width]` | |
| safetensors | `.safetensors` files: a tensor `[n, width]` | |
| parquet | parquet files, local or URLs: a column of lists of floats | the other columns |
| sail | `.pt` files: a tensor `[n, width]`, or a list or dict of such or of vectors | |

Files are sorted by their numbers. Nothing in them is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lit_fast.embed.importers.vectors import SUFFIXES, open_vectors
from lit_fast.embed.sources.expand import expand, natural
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, is_directory, list_names
from lit_fast.storage.paths import StrPath, is_junk, is_url, join, stem, suffix
from lit_fast.utils.output import status

FORMATS = ("clip-retrieval", "npy", "safetensors", "parquet", "sail")


@dataclass(frozen=True)
class Part:
    """One file of features, `[rows, width]`."""

    path: str  # absolute, or a URL
    rows: int
    width: int
    dtype: str
    column: str = ""  # name of the column or tensor
    metadata: str = ""  # the parquet file of its rows
    label: str = ""  # names rows without a key; unique among the parts


def find_parts(sources: Sequence[StrPath], format: str = "", features: str = "") -> tuple[str, list[Part]]:
    """Return the format and the files of features in order; print the guesses.

    Args:
      sources: directories, files, patterns or URLs.
      format: one of `FORMATS`; "": guess it.
      features: name of the column or tensor; "": the only one that can be features.

    Raises:
      UserError: there are no files, one is damaged or does not hold features, or they do not fit each other.
    """
    texts = [os.fspath(source) for source in sources]
    format = format or _guess_format(texts)
    metadata: dict[str, str] = {}
    if format == "clip-retrieval":
        if len(texts) != 1:
            raise UserError(f"clip-retrieval's features are one directory, not {len(texts)}; give one SOURCE")
        paths, metadata = _clip_retrieval(texts[0])
    else:
        paths = sorted({path for text in texts for path in _files(text, format)}, key=natural)
    parts: list[Part] = []
    for path in paths:
        shape = open_vectors(path, features).shape
        own = path if format == "parquet" else metadata.get(path, "")
        parts.append(Part(path, shape.rows, shape.width, shape.dtype, shape.name, own))
        if (shape.width, shape.dtype, shape.name) != (parts[0].width, parts[0].dtype, parts[0].column):
            raise UserError(
                f"{path} holds {_row(parts[-1])}, {parts[0].path} holds {_row(parts[0])}; give files of one tower"
            )
    names = relative(paths)
    files = f"{len(parts)} files, {names[0]} to {names[-1]}" if len(parts) > 1 else names[0]
    status(f"features ({format}): {files}; {sum(p.rows for p in parts):,} rows of {_row(parts[0])}")
    return format, _labelled(parts)


def _row(part: Part) -> str:
    return f"{part.width} {part.dtype} a row" + (f" in {part.column}" if part.column else "")


def _labelled(parts: list[Part]) -> list[Part]:
    """Label each part with the stem of its file, or with its path below the common directory."""
    labels = [stem(part.path) for part in parts]
    if len(set(labels)) < len(labels):
        labels = relative([part.path for part in parts])
    return [replace(part, label=label) for part, label in zip(parts, labels, strict=True)]


def relative(paths: list[str]) -> list[str]:
    """Return paths or URLs below their last common directory."""
    parts = [path.split("/") for path in paths]
    common, most = 0, min(map(len, parts)) - 1
    while common < most and len({path[common] for path in parts}) == 1:
        common += 1
    return ["/".join(path[common:]) for path in parts]


def _guess_format(sources: list[str]) -> str:
    """Return the one format of all sources."""
    found: dict[str, str] = {}
    for source in sources:
        if not is_url(source) and is_directory(source):
            names = list_names(source)
            if "img_emb" in names:
                found.setdefault("clip-retrieval", source)
            for file in names:
                if (kind := SUFFIXES.get(suffix(file), "")) and not is_junk(file):
                    found.setdefault(kind, join(source, file))
        elif kind := SUFFIXES.get(suffix(source.rstrip("}")), ""):
            found.setdefault(kind, source)
        elif not is_url(source) and not exists(source):
            raise UserError(f"{source} does not exist; give files or a directory of features")
        else:
            raise UserError(
                f"{source} does not have a suffix of features; give {', '.join(SUFFIXES)} files, or add --format"
            )
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise UserError(f"{first} is of format {a}, {second} is of format {b}; choose one with --format")
    if not found:
        raise UserError(f"{sources[0]} holds no features; give a directory with {', '.join(SUFFIXES)} files")
    return next(iter(found))


def _files(source: str, format: str) -> list[str]:
    """Return the files of a format that a SOURCE stands for."""
    suffixes = [suffix for suffix, kind in SUFFIXES.items() if kind == format]
    if is_url(source) or not is_directory(source):
        found = expand([source])
        if other := next((path for path in found if suffix(path) not in suffixes), ""):
            raise UserError(f"{other} is not a {' or '.join(suffixes)} file; give files of --format {format}")
        return found
    source = os.path.abspath(source)
    names = [n for n in list_names(source) if suffix(n) in suffixes and not is_junk(n)]
    if not names:
        hint = ", as SAIL's tensor_data/image_embedding/MODEL/DATA" if format == "sail" else ""
        raise UserError(f"{source} has no *{suffixes[0]} files; give the directory that holds them{hint}")
    return [join(source, file) for file in names]


def _clip_retrieval(source: str) -> tuple[list[str], dict[str, str]]:
    """Return the files of features, and the metadata file of each, if there are any."""
    if not is_directory(source):
        raise UserError(f"{source} is not a directory; give the one that holds the features")
    source = os.path.abspath(source)
    metadata = _numbered(join(source, "metadata"), r"metadata_(\d+)\.parquet")
    paths = _numbered(join(source, "img_emb"), r"img_emb_(\d+)\.npy")
    if not paths:
        raise UserError(
            f"{source} has no img_emb/img_emb_0.npy; give the directory that clip-retrieval wrote"
        )
    if metadata and metadata.keys() != paths.keys():
        odd = min(metadata.keys() ^ paths.keys())
        has, lacks = ("metadata", "features") if odd in metadata else ("features", "metadata")
        raise UserError(f"{source} has {has} but no {lacks} of part {odd}; restore them")
    return [path for _, path in sorted(paths.items())], {paths[n]: path for n, path in metadata.items()}


def _numbered(directory: str, pattern: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for file in list_names(directory):
        if (match := re.fullmatch(pattern, file, re.ASCII)) and len(match[1]) < 20:
            number, path = int(match[1]), join(directory, file)
            if number in found:
                raise UserError(f"{path} and {found[number]} have the same number; remove one of them")
            found[number] = path
    return found
