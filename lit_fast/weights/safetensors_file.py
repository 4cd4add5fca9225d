"""Reading `.safetensors`: one file, or the parts that an index names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from safetensors import safe_open

from lit_fast.errors import UserError
from lit_fast.files import read_object
from lit_fast.weights.file import WeightsFile


def parts(path: Path) -> list[Path]:
    """The weights files of a `.safetensors` or of a `.safetensors.index.json`, which names its parts.

    Raises:
      UserError: the index is damaged or names a file outside of its directory.
    """
    if path.suffix == ".safetensors":
        return [path]
    names = read_object(path, "weight_map")["weight_map"]
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path} is damaged: weight_map names no files")
    for name in names.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
            raise UserError(f"{path} names {name!r}, which is not a .safetensors file beside it")
    return [path.parent / name for name in sorted(set(names.values()))]


@contextmanager
def open_safetensors(path: Path) -> Iterator[WeightsFile]:
    """The tensors of a file, or of all the parts of an index, read one at a time.

    Raises:
      UserError: a file is missing or damaged, or two parts hold the same tensor.
    """
    with ExitStack() as stack:
        shapes, where = {}, {}
        for part in parts(path):
            if not part.is_file():
                raise UserError(f"weights file {part} does not exist")
            try:  # the library checks the header against the size of the file
                file = stack.enter_context(safe_open(part, framework="numpy"))
                names = list(file.keys())
                sizes = [tuple(file.get_slice(name).get_shape()) for name in names]
            except Exception as error:  # SafetensorError, OSError, and what a hostile header may raise
                raise UserError(f"{part} is not a readable .safetensors: {error}") from None
            for name, shape in zip(names, sizes, strict=True):
                if name in where:
                    raise UserError(f"{path}: two parts hold {name}")
                shapes[name], where[name] = shape, (part, file)

        def read(name: str) -> np.ndarray:
            part, file = where[name]
            try:
                return file.get_tensor(name)
            except Exception as error:  # also types that numpy does not have
                raise UserError(f"{part}: {name} cannot be read: {error}") from None

        yield WeightsFile(path, shapes, read)
