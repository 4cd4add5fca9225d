"""Files of features as other programs write them, and the numbers in them.

| format | features in the directory | beside them |
|---|---|---|
| clip-retrieval | `img_emb/img_emb_0.npy`, `[n, width]`, ... | `metadata/metadata_0.parquet`, a row each |
| sail | `0.pt`, `1.pt`, ...: a tensor `[n, width]`, or a list or dict of such or of vectors | |

Files are taken in the order of their numbers. Nothing of them is unpickled or run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_fast.embed.importers.torch_file import read_torch_file
from lit_fast.embed.sources.expand import natural
from lit_fast.errors import UserError

FORMATS = ("clip-retrieval", "sail")
_MOST_HEADER = 10_000  # bytes of an .npy's header


@dataclass(frozen=True)
class Part:
    """One file of features, `[rows, width]`."""

    path: Path  # absolute
    rows: int
    width: int
    dtype: str
    metadata: Path | None = None  # the parquet file of its rows


def find_parts(source: Path, format: str) -> list[Part]:
    """The files of a directory in order; of each only the header is read.

    Raises:
      UserError: there are none, one is damaged or does not hold features, or they do not go together.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a directory; give the one that holds the features")
    source = Path(os.path.abspath(source))
    if format == "clip-retrieval":
        metadata = _numbered(source / "metadata", r"metadata_(\d+)\.parquet")
        paths = _numbered(source / "img_emb", r"img_emb_(\d+)\.npy")
        looked_for = "img_emb/img_emb_0.npy, as clip-retrieval writes it"
        if metadata and metadata.keys() != paths.keys() and paths:
            odd = min(metadata.keys() ^ paths.keys())
            raise UserError(
                f"{source} has {'metadata' if odd in metadata else 'features'} of part {odd} alone; restore the other"
            )
    else:
        metadata = {}
        paths = dict(enumerate(sorted(source.glob("*.pt"), key=lambda path: natural(path.name))))
        looked_for = "*.pt; SAIL's encode.py writes them to tensor_data/image_embedding/MODEL/DATA"
    if not paths:
        raise UserError(f"{source} has no {looked_for}")
    parts = []
    for number, path in sorted(paths.items()):
        shape = _shape(read_pieces(path), path)
        parts.append(Part(path, *shape, metadata.get(number)))
        if shape[1:] != (parts[0].width, parts[0].dtype):
            raise UserError(
                f"{path} holds {shape[1]} {shape[2]} a row, {parts[0].path} holds {parts[0].width} {parts[0].dtype}; "
                "one tower's features are all alike"
            )
    return parts


def _numbered(directory: Path, pattern: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if (match := re.fullmatch(pattern, path.name, re.ASCII)) and len(match[1]) < 20:
            if int(match[1]) in found:
                raise UserError(f"{path} and {found[int(match[1])]} have the same number; remove one of them")
            found[int(match[1])] = path
    return found


def read_pieces(path: Path) -> list[np.ndarray]:
    """The features of a file: float arrays `[n, width]` that follow each other, views of the mapped file.

    Raises:
      UserError: the file is damaged, or does not hold features.
    """
    if not path.is_file():  # a FIFO would never end
        raise UserError(f"{path} is not a regular file")
    if path.suffix == ".npy":
        return [_read_npy(path)]
    found = read_torch_file(path)
    if isinstance(found, dict):
        if len(found) > 1 and any(_dimensions(value) != 1 for value in found.values()):
            names = ", ".join(str(name)[:50] for name in list(found)[:5])
            raise UserError(f"{path} holds several arrays ({names}); save that of the images alone")
        found = list(found.values())
    values = [found] if isinstance(found, np.ndarray) else found
    if (
        not isinstance(values, list | tuple)
        or not values
        or any(_dimensions(v) not in (1, 2) for v in values)
    ):
        raise UserError(
            f"{path} holds no features: a tensor [n, width], or a list or dict of such or of vectors"
        )
    pieces = [value.reshape(-1, value.shape[-1]) for value in values]
    if sum(piece.nbytes for piece in pieces) > path.stat().st_size:  # the same tensor again and again
        raise UserError(f"{path} is damaged: its tensors are larger than the file")
    return pieces


def _dimensions(value: Any) -> int:
    return value.ndim if isinstance(value, np.ndarray) else -1


def _shape(pieces: list[np.ndarray], path: Path) -> tuple[int, int, str]:
    widths, dtypes = {piece.shape[1] for piece in pieces}, {piece.dtype.name for piece in pieces}
    if len(widths) > 1 or len(dtypes) > 1 or 0 in widths:
        raise UserError(f"{path} holds vectors of widths {sorted(widths)} and types {sorted(dtypes)}")
    return sum(map(len, pieces)), widths.pop(), dtypes.pop()


def _read_npy(path: Path) -> np.ndarray:
    """A float array [n, width], mapped; the header is checked before anything is allocated."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0
            }.get(version)  # fmt: skip
            if read is None:
                raise ValueError(f"version {version}")
            shape, fortran, dtype = read(file, max_header_size=_MOST_HEADER)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is damaged or is not an .npy file: {str(error)[:200]}") from None
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != 2 or fortran:
        order = ", column by column" if fortran else ""
        raise UserError(f"{path} holds {dtype} {list(shape)}{order}; features are floats [n, width]")
    rows, width = shape
    if rows < 0 or width < 1 or start + rows * width * dtype.itemsize != size:
        raise UserError(f"{path} is damaged: {size:,} bytes are not those of {dtype} {list(shape)}")
    if not rows:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape)
