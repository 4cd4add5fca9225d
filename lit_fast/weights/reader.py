"""A weights file of any format: named arrays, each checked when it is read; and the reader of `.safetensors`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import safe_open

from lit_fast.errors import UserError
from lit_fast.storage.cache import local_copy
from lit_fast.storage.files import is_file
from lit_fast.storage.paths import StrPath, join, parent
from lit_fast.storage.text_files import read_object

_MAX_PARTS = 200


def unusable_weights(path: object, problem: str) -> UserError:
    """Return the error for weights that are not those of a model of lit_fast's own."""
    return UserError(f"{path}: {problem}; give other weights")


@dataclass
class WeightsFile:
    """The arrays of one file, or of several that belong together.

    Attributes:
      path: for messages.
      shapes: of all arrays by name; known to fit the size of the file.
      read: returns one array as it is stored.
      taken: names that `take` returned.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    taken: set[str] = field(default_factory=set)

    def take(self, name: str, *shape: int | None) -> np.ndarray:
        """Return one array as float32; with `shape`, of that shape, where None is any length.

        Raises:
          UserError: it is missing, has another shape, or holds something else than finite numbers.
        """
        if name not in self.shapes:
            raise unusable_weights(self.path, f"{name} is missing")
        have = self.shapes[name]
        if shape and (
            len(have) != len(shape) or any(w not in (None, h) for h, w in zip(have, shape, strict=True))
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise unusable_weights(self.path, f"{name} has shape {have}, the ViT needs ({wanted})")
        if not math.prod(have):
            raise unusable_weights(self.path, f"{name} is empty: shape {have}")
        array = self.read(name)
        self.taken.add(name)
        if array.dtype.name != "bfloat16" and array.dtype.kind not in "fiu":
            raise unusable_weights(self.path, f"{name} holds {array.dtype}, not numbers")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise unusable_weights(self.path, f"{name} holds values that are not finite")
        return array

    def refuse_unused(self, ignored: Callable[[str], object]) -> None:
        """Check that every array was taken, apart from those that `ignored` accepts.

        Raises:
          UserError: one was not.
        """
        unused = sorted(n for n in self.shapes if n not in self.taken and not ignored(n))
        if unused:
            problem = f"holds {unused[0]}, which this kind of ViT does not have ({len(unused)} such arrays)"
            raise unusable_weights(self.path, problem)


def parts(path: StrPath) -> list[str]:
    """Return the weights files of a `.safetensors`, which is the only one, or of a `.safetensors.index.json`.

    Raises:
      UserError: the index is damaged or names something else than `.safetensors` files beside it.
    """
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        return [path]
    files = read_object(path, "weight_map")["weight_map"]
    names = list(files.values()) if isinstance(files, dict) else []
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise unusable_weights(path, f"{str(name)[:80]!r} is not a .safetensors file beside it")
    if not 0 < len(set(names)) <= _MAX_PARTS:
        raise unusable_weights(path, f"weight_map names {len(set(names))} files")
    return [join(parent(path), name) for name in sorted(set(names))]


@contextmanager
def open_safetensors(path: StrPath) -> Iterator[WeightsFile]:
    """Open a `.safetensors`, or all the parts of an index; tensors are read one at a time.

    Raises:
      UserError: a file is missing or damaged, or two parts hold the same tensor.
    """
    path = os.fspath(path)
    with ExitStack() as stack:
        shapes: dict[str, tuple[int, ...]] = {}
        files: dict[str, tuple[str, Any]] = {}
        for part in parts(path):
            if not is_file(part):
                raise UserError(f"weights file {part} does not exist; restore it")
            try:  # the library checks the header against the size of the file
                file = stack.enter_context(safe_open(local_copy(part, in_parts=True), framework="numpy"))
                sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except Exception as error:  # SafetensorError, OSError, and those of hostile headers
                raise unusable_weights(part, f"not a readable .safetensors ({error})") from None
            if twice := sizes.keys() & shapes.keys():
                raise unusable_weights(path, f"two parts hold {min(twice)}")
            shapes |= sizes
            files |= dict.fromkeys(sizes, (part, file))

        def read(name: str) -> np.ndarray:
            part, file = files[name]
            try:
                return file.get_tensor(name)
            except Exception as error:  # also types that numpy does not have
                raise unusable_weights(part, f"{name} cannot be read: {error}") from None

        yield WeightsFile(path, shapes, read)
