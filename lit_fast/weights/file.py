"""A weights file of any format: named arrays, each checked when it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lit_fast.errors import UserError


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
