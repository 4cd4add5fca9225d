"""The files of features as other programs write them, and their arrays.

| format | features in the directory | beside them |
|---|---|---|
| clip-retrieval | `img_emb/img_emb_0.npy`, `[n, width]`, ... | `metadata/metadata_0.parquet`, a row each |
| sail | `0.pt`, `1.pt`, ...: a tensor `[n, width]`, or a list or dict of such or of vectors | |

Files are sorted by their numbers. Nothing in them is run.
"""

from __future__ import annotations

import os
import pickle
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_fast.data.features import BFLOAT16
from lit_fast.embed.sources.expand import natural
from lit_fast.errors import UserError, first_line, os_reason
from lit_fast.storage.files import is_directory, is_file, list_names, local_path, size
from lit_fast.storage.paths import StrPath, is_junk, join, suffix

_FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")


@dataclass(frozen=True)
class Part:
    """One file of features, `[rows, width]`."""

    path: str  # absolute
    rows: int
    width: int
    dtype: str
    metadata: str = ""  # the parquet file of its rows


def find_parts(source: StrPath, format: str) -> list[Part]:
    """Return the files of a directory in order.

    Raises:
      UserError: there are none, one is damaged or does not hold features, or they do not fit each other.
    """
    if not is_directory(source):
        raise UserError(f"{source} is not a directory; give the one that holds the features")
    source = os.path.abspath(source)
    metadata: dict[int, str] = {}
    if format == "clip-retrieval":
        metadata = _numbered(join(source, "metadata"), r"metadata_(\d+)\.parquet")
        paths = _numbered(join(source, "img_emb"), r"img_emb_(\d+)\.npy")
        wanted = "img_emb/img_emb_0.npy, as clip-retrieval writes it"
        if metadata and metadata.keys() != paths.keys() and paths:
            odd = min(metadata.keys() ^ paths.keys())
            raise UserError(
                f"{source} has {'metadata' if odd in metadata else 'features'} of part {odd} alone; restore the other"
            )
    else:
        names = [name for name in list_names(source) if name.endswith(".pt") and not is_junk(name)]
        paths = {i: join(source, name) for i, name in enumerate(sorted(names, key=natural))}
        wanted = "*.pt; SAIL's encode.py writes them to tensor_data/image_embedding/MODEL/DATA"
    if not paths:
        raise UserError(f"{source} has no {wanted}")
    parts: list[Part] = []
    for number, path in sorted(paths.items()):
        part = Part(path, *_shape(read_pieces(path), path), metadata.get(number, ""))
        parts.append(part)
        if (part.width, part.dtype) != (parts[0].width, parts[0].dtype):
            raise UserError(
                f"{path} holds {part.width} {part.dtype} a row, {parts[0].path} holds {parts[0].width} "
                f"{parts[0].dtype}; give files of one tower"
            )
    return parts


def _numbered(directory: str, pattern: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for file in list_names(directory):
        if (match := re.fullmatch(pattern, file, re.ASCII)) and len(match[1]) < 20:
            number, path = int(match[1]), join(directory, file)
            if number in found:
                raise UserError(f"{path} and {found[number]} have the same number; remove one of them")
            found[number] = path
    return found


def read_pieces(path: str) -> list[np.ndarray]:
    """Return the features of a file as consecutive arrays that map the file.

    Returns:
      float `[n, width]` each.

    Raises:
      UserError: the file is damaged, or does not hold features.
    """
    if not is_file(path):  # a FIFO would never end
        raise UserError(f"{path} is not a regular file; restore it")
    if suffix(path) == ".npy":
        return [_read_npy(path)]
    found = read_torch_file(path)
    if isinstance(found, dict):
        if len(found) > 1 and any(_dimensions(value) != 1 for value in found.values()):
            names = ", ".join(str(key)[:50] for key in list(found)[:5])
            raise UserError(f"{path} holds several arrays ({names}); save that of the images alone")
        found = list(found.values())
    values = [found] if isinstance(found, np.ndarray) else found
    if not isinstance(values, list) or not values or any(_dimensions(v) not in (1, 2) for v in values):
        raise UserError(
            f"{path} holds no features; save a tensor [n, width], or a list or dict of such or of vectors"
        )
    pieces = [value.reshape(-1, value.shape[-1]) for value in values]
    if sum(piece.nbytes for piece in pieces) > size(path):  # one tensor many times, or expanded
        raise UserError(f"{path} is damaged: its tensors are larger than the file")
    return pieces


def _dimensions(value: Any) -> int:
    return value.ndim if isinstance(value, np.ndarray) else -1


def _shape(pieces: list[np.ndarray], path: str) -> tuple[int, int, str]:
    widths, dtypes = {piece.shape[1] for piece in pieces}, {piece.dtype.name for piece in pieces}
    if len(widths) > 1 or len(dtypes) > 1 or 0 in widths:
        raise UserError(f"{path} holds vectors of widths {sorted(widths)} and types {sorted(dtypes)}")
    return sum(map(len, pieces)), widths.pop(), dtypes.pop()


def _read_npy(path: str) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(local_path(path), mode="r")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {os_reason(error)}") from None
    except (ValueError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is damaged or is not an .npy file of numbers: {first_line(error)}") from None
    if array.dtype.kind != "f" or array.dtype.itemsize > 8 or array.ndim != 2 or not array.shape[1]:
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}; features are floats [n, width]")
    if array.offset + array.nbytes != size(path):
        raise UserError(f"{path} is damaged: its {size(path):,} bytes are not those of {list(array.shape)}")
    return array


def read_torch_file(path: StrPath) -> Any:
    """Return the content of a file: an array, or a list or dict with arrays.

    PyTorch reads it with `weights_only=True`, which makes nothing but tensors and containers. The arrays map the file.
    Other values in a list or dict are returned as they are.

    Raises:
      UserError: PyTorch is not installed, the file is damaged, of the format before PyTorch 1.6, or holds anything but
        tensors of floats in lists and dicts.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is read by PyTorch, which is not installed; run: pip install torch"
        ) from None

    def to_array(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = value.detach()
        if str(tensor.dtype) not in _FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path} holds a tensor of {tensor.dtype}; save features as dense floats")
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()

    try:
        value = torch.load(local_path(path), map_location="cpu", weights_only=True, mmap=True)
        # One level only: nested containers may refer to each other and grow without bound.
        if isinstance(value, list | tuple):
            return [to_array(item) for item in value]
        if isinstance(value, dict):
            return {key: to_array(item) for key, item in value.items()}
        return to_array(value)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {os_reason(error)}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors in lists and dicts and is not unpickled; save the features alone with "
            "torch.save(TENSOR, FILE)"
        ) from None
    except Exception as error:  # damage makes PyTorch raise many kinds
        if "_use_new_zipfile_serialization" in str(error):
            raise UserError(
                f"{path} is of torch's old format, or is damaged; convert it with: torch.save(torch.load(FILE), FILE)"
            ) from None
        raise UserError(f"{path} is damaged: {type(error).__name__} {first_line(error)}") from None
