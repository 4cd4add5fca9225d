"""Rows that a program has made, stored in pieces until all are there.

    D/rows.tmp/000000.npy    vectors of piece 0: the bits of bfloat16 `[n, width]` as uint16
    D/rows.tmp/000000.json   its keys, captions and problems; written last
    D/rows.tmp/end.json      there are no further rows

A piece is complete when its JSON file exists. If the program is killed, the rows of all complete pieces are kept.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lit_fast.data.dataset import compact_json
from lit_fast.data.features import BFLOAT16
from lit_fast.embed.importers.vectors import Shape
from lit_fast.errors import UserError
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import exists, list_names, local_path
from lit_fast.storage.paths import join
from lit_fast.storage.text_files import read_object

_PIECE_ROWS = 4096
_PIECE_SECONDS = 60.0  # work that a kill may cost


class StoredRow(NamedTuple):
    """One row without its vector; `problem` is "" if it can be a row of a dataset."""

    key: str
    captions: list[str]
    problem: str


class RowStore:
    """Complete pieces of rows, and the rows of the next piece in memory.

    Attributes:
      width: of the vectors; 0 before the first row.
      dtype: of the vectors as they were given.
      rows: number of rows in complete pieces.
      ended: whether there are no further rows.
    """

    def __init__(self, path: str) -> None:
        """Open a store, which may be empty.

        Raises:
          UserError: it is damaged.
        """
        self._path = path
        self._firsts = [0]
        self.width, self.dtype = 0, ""
        names = set(list_names(path))
        while f"{len(self._firsts) - 1:06d}.json" in names:
            piece = self._piece(len(self._firsts) - 1)
            self.width, self.dtype = piece["width"], piece["dtype"]
            self._firsts.append(self._firsts[-1] + len(piece["keys"]))
        self.ended = exists(join(path, "end.json"))
        self._pending: list[StoredRow] = []
        self._vectors: list[np.ndarray] = []
        self._written = time.monotonic()
        self._open: tuple[int, np.ndarray] = (-1, np.zeros((0, 0), BFLOAT16))

    @property
    def rows(self) -> int:
        return self._firsts[-1]

    @property
    def shape(self) -> Shape:
        """Of all stored vectors."""
        return Shape(self.rows, self.width, "bfloat16")

    def add(self, row: StoredRow, vector: np.ndarray) -> None:
        """Append a row with its vector, float `[width]`; write a piece where it is full or old."""
        if not self.width:
            self.width, self.dtype = len(vector), vector.dtype.name
        with np.errstate(over="ignore"):  # too large a value becomes infinite, and its row invalid
            self._vectors.append(vector.astype(np.float32).astype(BFLOAT16))
        self._pending.append(row)
        if len(self._pending) == _PIECE_ROWS or time.monotonic() - self._written > _PIECE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory as a piece."""
        if self._pending:
            number, buffer = len(self._firsts) - 1, io.BytesIO()
            np.save(buffer, np.stack(self._vectors).view(np.uint16))
            write_atomic(join(self._path, f"{number:06d}.npy"), buffer.getvalue())
            columns = zip(StoredRow._fields, zip(*self._pending, strict=True), strict=True)
            piece = {"width": self.width, "dtype": self.dtype} | {
                {"key": "keys", "problem": "problems"}.get(name, name): list(column)
                for name, column in columns
            }
            write_atomic(join(self._path, f"{number:06d}.json"), compact_json(piece))
            self._firsts.append(self.rows + len(self._pending))
            self._pending, self._vectors = [], []
        self._written = time.monotonic()

    def end(self) -> None:
        """Write the last rows; there are no further ones."""
        self.flush()
        write_atomic(join(self._path, "end.json"), b"{}")
        self.ended = True

    def __iter__(self) -> Iterator[StoredRow]:
        """Yield the rows of the complete pieces in order."""
        for number in range(len(self._firsts) - 1):
            piece = self._piece(number)
            columns = piece["keys"], piece["captions"], piece["problems"]
            yield from (StoredRow(*row) for row in zip(*columns, strict=True))

    def last_key(self) -> str:
        """Return the key of the last stored row."""
        return str(self._piece(len(self._firsts) - 2)["keys"][-1])

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Return the vectors of stored rows, bfloat16 `[len(rows), width]`, as `Vectors.read`."""
        pieces = np.searchsorted(self._firsts, rows, side="right") - 1
        values = np.empty((len(rows), self.width), BFLOAT16)
        for piece in np.unique(pieces).tolist():
            chosen = pieces == piece
            values[chosen] = self._array(piece)[rows[chosen] - self._firsts[piece]]
        return values, {}

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield the vectors of each piece, bfloat16 `[n, width]`."""
        return map(self._array, range(len(self._firsts) - 1))

    def _piece(self, number: int) -> dict[str, Any]:
        path = join(self._path, f"{number:06d}.json")
        types: dict[str, type] = {
            "width": int,
            "dtype": str,
            "keys": list,
            "captions": list,
            "problems": list,
        }
        piece = read_object(path, *types, **types)
        if not len(piece["keys"]) == len(piece["captions"]) == len(piece["problems"]):
            raise UserError(f"{path} is damaged; delete {self._path} and import again")
        return piece

    def _array(self, number: int) -> np.ndarray:
        if self._open[0] != number:
            path = join(self._path, f"{number:06d}.npy")
            try:
                array = np.load(local_path(path), allow_pickle=False).view(BFLOAT16)
            except (OSError, ValueError, TypeError, EOFError) as error:
                raise UserError(
                    f"{path} is damaged ({error}); delete {self._path} and import again"
                ) from None
            if array.shape != (self._firsts[number + 1] - self._firsts[number], self.width):
                raise UserError(f"{path} is damaged; delete {self._path} and import again")
            self._open = (number, array)
        return self._open[1]
