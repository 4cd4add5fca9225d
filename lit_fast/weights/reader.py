"""A weights file of any format: named arrays, each checked when it is taken."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open

from lit_fast.errors import UserError
from lit_fast.storage.files import read_object


@dataclass
class WeightsFile:
    """The arrays of one file, or of several that belong together.

    `read` returns one array as it is stored; `shapes` are known to fit the size of the file.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    taken: set[str] = field(default_factory=set)

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """One array as float32; with `shape`, of that shape (None stands for any length).

        Raises:
          UserError: it is missing, has another shape, or holds something else than finite numbers.
        """
        if name not in self.shapes:
            raise UserError(f"{self.path}: {name} is missing")
        have = self.shapes[name]
        if shape and (
            len(have) != len(shape) or any(w not in (None, h) for h, w in zip(have, shape, strict=True))
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise UserError(f"{self.path}: {name} has shape {have}, the ViT needs ({wanted})")
        if not math.prod(have):
            raise UserError(f"{self.path}: {name} is empty: shape {have}")
        array = self.read(name)
        self.taken.add(name)
        if array.dtype.name != "bfloat16" and array.dtype.kind not in "fiu":
            raise UserError(f"{self.path}: {name} holds {array.dtype}, not numbers")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{self.path}: {name} holds values that are not finite")
        return array

    def refuse_unused(self, ignored: Callable[[str], object]) -> None:
        """Everything must have been taken, apart from what is known not to matter.

        Raises:
          UserError: something was not.
        """
        unused = sorted(n for n in self.shapes if n not in self.taken and not ignored(n))
        if unused:
            raise UserError(
                f"{self.path} holds {unused[0]}, which this kind of ViT does not have ({len(unused)} such arrays)"
            )


# Reading `.safetensors`: one file, or the parts that an index names.


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
