"""Reading ViT weights from AugReg and big_vision `.npz` files into big_vision's current names.

Old names come from pre-Linen Flax, where sub-modules were numbered across classes (LayerNorm_0,
MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3). Nothing is unpickled.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage

from lit_fast.errors import UserError

Params = dict[str, Any]

_PREFIXES = ("opt/target/", "params/", "img/")
# Number in an old block -> current name.
_OLD_NAMES = {
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
}
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)")
_BYTES_LIMIT = 16 << 30  # the largest public ViT has 8 GiB; a file that unpacks to more is hostile


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` as float32 under their names in the file, without pickle.

    Raises:
      UserError: not an npz, or it holds objects, non-finite or non-numeric arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _BYTES_LIMIT:
                raise UserError(f"{path} unpacks to more than {_BYTES_LIMIT >> 30} GiB and is refused")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UserError(f"{path} is not a readable .npz of plain arrays: {error}") from None
    out = {}
    for name, array in arrays.items():
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which numpy does not know
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if array.dtype.kind not in "fiu":
            raise UserError(f"{path}: {name} holds {array.dtype}, not numbers")
        out[name] = array.astype(np.float32)
        if not np.isfinite(out[name]).all():
            raise UserError(f"{path}: {name} holds values that are not finite")
    return out


def vit_params(arrays: dict[str, np.ndarray], path: Path) -> Params:
    """Nested parameters of `lit_fast.vit.ViT` from a file's arrays; `head` and `pre_logits` are dropped.

    The class token takes over its row of the old positional embedding, as big_vision does.

    Raises:
      UserError: an array is missing or the names are not those of a ViT.
    """
    flat: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        for old, new in _OLD_NAMES.items():
            name = name.replace(f"/{old}/", f"/{new}/")
        flat[name] = array
    for old in ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"):
        if old in flat:
            flat["pos_embedding"] = flat.pop(old)
    if "embedding/kernel" not in flat or "pos_embedding" not in flat:
        raise UserError(f"{path} does not hold a ViT: embedding/kernel or pos_embedding is missing")
    if any(name.startswith("MAPHead") for name in flat):
        raise UserError(f"{path} pools with a MAP head, which is not supported")
    positions = flat["pos_embedding"]
    if positions.ndim != 3 or positions.shape[0] != 1:
        raise UserError(f"{path}: pos_embedding has shape {positions.shape}, expected (1, tokens, width)")
    if "cls" in flat and not _is_square(positions.shape[1]) and _is_square(positions.shape[1] - 1):
        flat["cls"] = flat["cls"] + positions[:, :1]
        flat["pos_embedding"] = positions[:, 1:]
    kept = ("embedding/", "Transformer/", "cls", "pos_embedding")
    return _nest(_stack_blocks({n: a for n, a in flat.items() if n.startswith(kept)}, path))


def _is_square(n: int) -> bool:
    return round(n**0.5) ** 2 == n


def _stack_blocks(flat: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    blocks: dict[str, dict[int, np.ndarray]] = {}
    out = {}
    for name, array in flat.items():
        match = _BLOCK.fullmatch(name)
        if match:
            blocks.setdefault(match[2], {})[int(match[1])] = array
        else:
            out[name] = array
    depth = max((len(b) for b in blocks.values()), default=0)
    for name, parts in blocks.items():
        missing = sorted(set(range(depth)) - set(parts))
        if missing:
            raise UserError(f"{path}: encoderblock_{missing[0]}/{name} is missing")
        if len({a.shape for a in parts.values()}) > 1:
            raise UserError(f"{path}: {name} has not the same shape in every block")
        out[f"Transformer/encoderblock/{name}"] = np.stack([parts[i] for i in range(depth)])
    return out


def _nest(flat: dict[str, np.ndarray]) -> Params:
    tree: Params = {}
    for name, array in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def resample_positions(positions: np.ndarray, grid: int) -> np.ndarray:
    """Positional embedding [1, old*old, width] for another grid: [1, grid*grid, width].

    Linear and corner-aligned, as big_vision and vision_transformer do; timm's rule differs.
    """
    old = round(positions.shape[1] ** 0.5)
    if old == grid:
        return positions
    width = positions.shape[-1]
    image = positions.reshape(old, old, width)
    image = scipy.ndimage.zoom(image, (grid / old, grid / old, 1), order=1)
    return image.reshape(1, grid * grid, width).astype(np.float32)
