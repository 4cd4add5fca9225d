"""Read vision towers from `.npz` files of AugReg and big_vision, with old or current names of arrays.

Old names come from pre-Linen Flax, where sub-modules were numbered across classes (LayerNorm_0,
MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3). Nothing is unpickled.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

import numpy as np
from numpy.lib import format as npy

from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture
from lit_fast.storage.cache import local_copy
from lit_fast.storage.files import open_read
from lit_fast.storage.paths import StrPath
from lit_fast.weights.parameters import (
    Params,
    Weights,
    architecture_of,
    nested,
    square_grid,
)
from lit_fast.weights.reader import WeightsFile, unusable_weights

_PREFIXES = ("", "params/", "opt/target/", "img/", "params/img/", "opt/target/img/")
# Arrays beside the tower: its classifier, the other tower, the optimizer, temperature and bias.
_IGNORED = re.compile(r"(head|pre_logits|txt|opt)/.*|[tb]")
# The largest public ViT has 16 GiB, and weights hardly compress: a file that unpacks to more is hostile.
_BYTES_LIMIT = 20 << 30
_RATIO_LIMIT = 100
_SMALL = 64 << 20


def load_npz(path: str) -> Weights:
    """Read a ViT from a `.npz`, without its classifier (`head`, `pre_logits`).

    Without a MAP head the GELU is exact, as timm runs these weights; with one (ViT-g, ViT-G, SigLIP) it is tanh's
    approximation, as in big_vision.

    Raises:
      UserError: the file is not such a `.npz`, or an array is missing, in excess or of another shape.
    """
    with open_npz(path) as file:
        prefix = next((p for p in _PREFIXES if f"{p}embedding/kernel" in file.shapes), None)
        if prefix is None:
            raise unusable_weights(path, "no ViT, embedding/kernel is missing")
        names = _current_names({n.removeprefix(prefix): n for n in file.shapes if n.startswith(prefix)}, path)
        flat = stack_blocks(file, names, "Transformer")
        _fold_positions(flat, path)
        file.refuse_unused(lambda n: not n.startswith(prefix) or _IGNORED.fullmatch(n.removeprefix(prefix)))
    params = nested(flat, path)
    return Weights(params, _architecture(params, path), "linear")


@contextmanager
def open_npz(path: StrPath) -> Iterator[WeightsFile]:
    """Open a `.npz` without unpickling; bfloat16, which numpy writes as two opaque bytes, becomes float32.

    Raises:
      UserError: it is no `.npz`, or it has objects, arrays larger than their data, or a decompression bomb.
    """

    def refuse(error: object) -> UserError:
        return unusable_weights(path, f"not a readable .npz of plain arrays ({error})")

    def read(name: str) -> np.ndarray:
        try:
            with archive.open(f"{name}.npy") as member:
                array = npy.read_array(member, allow_pickle=False)
        except Exception as error:  # zipfile, the decompressors and numpy raise a dozen kinds
            raise refuse(error) from None
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return array

    path = os.fspath(path)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open_read(local_copy(path, in_parts=True)))
            archive = stack.enter_context(zipfile.ZipFile(file))
        except UserError:
            raise
        except Exception as error:
            raise refuse(error) from None
        entries = [e for e in archive.infolist() if e.filename.endswith(".npy")]
        unpacked = sum(e.file_size for e in entries)
        if unpacked > min(_BYTES_LIMIT, _SMALL + _RATIO_LIMIT * file.seek(0, os.SEEK_END)):
            raise unusable_weights(path, f"unpacks to {unpacked / 2**30:.1f} GiB and is refused")
        shapes = {}
        for entry in entries:
            try:
                with archive.open(entry) as member:
                    shapes[entry.filename.removesuffix(".npy")] = _claimed_shape(member, entry.file_size)
            except Exception as error:
                raise refuse(error) from None
        yield WeightsFile(path, shapes, read)


def _claimed_shape(member: IO[bytes], size: int) -> tuple[int, ...]:
    """Return the shape in the header of an `.npy` member, checked, as numpy allocates that many bytes."""
    version = npy.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = header(member)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"an array claims the shape {shape}, which its {size} bytes cannot hold")
    return tuple(shape)


def _current_names(names: dict[str, str], path: str) -> dict[str, str]:
    """Map big_vision's current name of each array of the tower to its name in the file.

    The order of the fixes is that of big_vision (models/vit.py, fix_old_checkpoints).

    Args:
      names: name without the file's prefix -> name in the file.
      path: for messages.

    Raises:
      UserError: two arrays have the same name.
    """
    out: dict[str, str] = {}
    for current, name in _renumbered(names).items():
        current = re.sub(r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding", current)
        if "probe" in names and re.match(r"probe$|(MlpBlock|MultiHeadDot\w+|LayerNorm)_\d", current):
            current = f"MAPHead_0/{current}"
        if not re.match(r"(embedding|Transformer|MAPHead_0)/|(cls|pos_embedding)$", current):
            continue
        if current in out:
            raise unusable_weights(path, f"{out[current]} and {name} are the same array")
        out[current] = name
    return out


def _renumbered(names: dict[str, str]) -> dict[str, str]:
    """Number modules `<Class>_<number>` from 0 for each class and parent, as Linen does."""
    module = re.compile(r"(?<![^/])([A-Z]\w*)_(\d+)(?![^/])")
    numbers: dict[str, set[int]] = {}  # of a parent and class
    for name in names:
        for match in module.finditer(name):
            numbers.setdefault(name[: match.end(1)], set()).add(int(match[2]))

    def current(match: re.Match[str]) -> str:
        siblings = sorted(numbers[match.string[: match.end(1)]])
        return f"{match[1]}_{siblings.index(int(match[2]))}"

    renamed: dict[str, str] = {}
    for name, stored in names.items():
        renamed.setdefault(module.sub(current, name), stored)
    return renamed


def stack_blocks(file: WeightsFile, names: dict[str, str], encoder: str) -> dict[str, np.ndarray]:
    """Take the arrays of `names` and stack the encoder's blocks, unless they are stacked in the file.

    Args:
      file: an open weights file.
      names: current name -> name in the file.
      encoder: the module of the blocks, as in `Transformer/encoderblock_0/...`.

    Returns:
      float32 arrays by current name; blocks as `<encoder>/encoderblock/...`, stacked on a leading axis.

    Raises:
      UserError: a block lacks an array, or its shapes differ from the first block's.
    """
    block = re.compile(rf"{encoder}/encoderblock_(\d{{1,4}})/(.+)")
    parts: dict[str, dict[int, str]] = {}
    flat = {}
    for current, name in names.items():
        if match := block.fullmatch(current):
            parts.setdefault(match[2], {})[int(match[1])] = name
        else:
            flat[current] = file.take(name)
    depth = max((1 + max(found) for found in parts.values()), default=0)
    for leaf, found in parts.items():
        missing = sorted(set(range(depth)) - set(found))
        if missing:
            raise unusable_weights(file.path, f"encoderblock_{missing[0]}/{leaf} is missing")
        if len({file.shapes[n] for n in found.values()}) > 1:
            raise unusable_weights(file.path, f"{leaf} does not have the same shape in every block")
        flat[f"{encoder}/encoderblock/{leaf}"] = np.stack([file.take(found[i]) for i in range(depth)])
    return flat


def _fold_positions(flat: dict[str, np.ndarray], path: str) -> None:
    """Add the class token's row of an old positional embedding to the class token, as big_vision does."""
    positions = flat.get("pos_embedding")
    if positions is None:
        raise unusable_weights(path, "no ViT, pos_embedding is missing")
    if positions.ndim != 3 or positions.shape[0] != 1:
        raise unusable_weights(
            path, f"pos_embedding has shape {positions.shape}, expected (1, tokens, width)"
        )
    count, width = positions.shape[1:]
    if math.isqrt(count) ** 2 + 1 == count:
        if "cls" in flat:
            if flat["cls"].shape != (1, 1, width):
                raise unusable_weights(
                    path, f"cls has shape {flat['cls'].shape}, the ViT needs {(1, 1, width)}"
                )
            flat["cls"] = flat["cls"] + positions[:, :1]
        flat["pos_embedding"] = positions[:, 1:]
    square_grid(flat["pos_embedding"].shape[1], path)


def _architecture(params: Params, path: str) -> Architecture:
    kernel = params["embedding"]["kernel"]
    if kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1] or kernel.shape[2] != 3:
        raise unusable_weights(
            path, f"embedding/kernel has shape {kernel.shape}, the ViT needs (patch, patch, 3, width)"
        )
    try:
        a = architecture_of(params, "tanh" if "MAPHead_0" in params else "exact", 1e-6)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        raise unusable_weights(path, "does not hold the encoder blocks of a ViT") from None
    if a.shape.width % a.shape.heads:
        raise unusable_weights(path, f"a width of {a.shape.width} cannot be split into {a.shape.heads} heads")
    return a
