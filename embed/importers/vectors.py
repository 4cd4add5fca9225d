"""Read the vectors of a file of features, in pieces: `.npy`, `.pt`, `.safetensors` and columns of parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import safe_open

from lit_fast.data.features import BFLOAT16
from lit_fast.data.images.parquet import ERRORS
from lit_fast.embed.importers.torch_file import read_torch_file
from lit_fast.embed.sources.columns import require_column, some
from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.files import is_file, local_path, open_read, size
from lit_fast.storage.paths import is_url, suffix

SUFFIXES = {
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".pt": "sail",
}

_BATCH_ROWS = 1024
_MAX_WIDTH = 1 << 16
_FLOAT_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Shape:
    """The vectors of a file."""

    rows: int
    width: int
    dtype: str
    name: str = ""  # of the tensor or the column


class Vectors(Protocol):
    """The open vectors of a file."""

    @property
    def shape(self) -> Shape:
        """Of all vectors."""

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Return some vectors, float `[len(rows), width]`, and why rows of the result have none.

        Args:
          rows: ascending. Reading a file in its order is fast.
        """


def open_vectors(path: str, name: str = "") -> Vectors:
    """Open a file of features.

    Args:
      name: the tensor or the column; "": the only one that can be features.

    Raises:
      UserError: the file is damaged, or does not hold features.
    """
    if not is_url(path) and not is_file(path):  # a FIFO would never end
        raise UserError(f"{path} is not a regular file; restore it")
    vectors = _open(path, SUFFIXES[suffix(path)], name)
    if vectors.shape.width > _MAX_WIDTH:
        raise UserError(
            f"{path} holds {vectors.shape.width:,} numbers per row, more than {_MAX_WIDTH:,}; give features of a tower"
        )
    return vectors


def _open(path: str, kind: str, name: str) -> Vectors:
    if kind == "parquet":
        return _ParquetVectors(path, name)
    if is_url(path):
        raise UserError(f"{path} is read from local disks only; download it first")
    if kind == "safetensors":
        return _TensorVectors(path, name)
    if name:
        raise UserError(f"{path} has no names for --features {name}; leave it out")
    return _ArrayVectors(path, [_read_npy(path)] if kind == "npy" else _read_tensors(path))


class _ArrayVectors:
    """Arrays that map a file."""

    def __init__(self, path: str, pieces: list[np.ndarray]) -> None:
        widths, dtypes = {piece.shape[1] for piece in pieces}, {piece.dtype.name for piece in pieces}
        if len(widths) > 1 or len(dtypes) > 1 or 0 in widths:
            raise UserError(
                f"{path} holds vectors of widths {sorted(widths)} and types {sorted(dtypes)}; give those of one tower"
            )
        self.shape = Shape(sum(map(len, pieces)), widths.pop(), dtypes.pop())
        self._pieces = pieces

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        if len(self._pieces) > 1:
            self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0][rows], {}


class _TensorVectors:
    """A tensor of a `.safetensors` file."""

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        try:  # the library checks the header against the size of the file
            file = safe_open(local_path(path), framework="numpy")
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
        except Exception as error:  # SafetensorError, OSError, and those of hostile headers
            raise UserError(
                f"{path} is damaged or is not a .safetensors file ({first_line(error)}); restore it"
            ) from None
        likely = [n for n, (dtype, shape) in found.items() if dtype in _FLOAT_TYPES and len(shape) == 2]
        name = _choose(path, name, found, likely, "tensor of floats [n, width]")
        dtype, dimensions = found[name]
        if name not in likely or not dimensions[1]:
            raise UserError(
                f"{path} holds {dtype} {list(dimensions)} in {name}; save features as floats [n, width]"
            )
        self._slice = slices[name]
        self.shape = Shape(dimensions[0], dimensions[1], _FLOAT_TYPES[dtype], name)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        first = int(rows[0])
        try:
            return np.asarray(self._slice[first : int(rows[-1]) + 1])[rows - first], {}
        except Exception as error:
            raise UserError(f"{self._path} is damaged ({first_line(error)}); restore it") from None


class _ParquetVectors:
    """A column of lists of floats; one batch of rows is in memory."""

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(open_read(path), buffer_size=1 << 20)
            schema = self._file.schema_arrow
            likely = [field.name for field in schema if _element(field.type) is not None]
            name = _choose(path, name, schema.names, likely, "column of lists of floats")
            if name not in likely:
                kind = schema.field(name).type
                raise UserError(f"{path} holds {kind} in {name}; save features as lists of floats")
            kind = _storage(schema.field(name).type)
            groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            self._firsts = np.cumsum([0, *groups])  # first row of each row group
            if self._firsts[-1] != self._file.metadata.num_rows or min(groups, default=0) < 0:
                raise ValueError("the rows of its row groups are not those of the file")
            self._name, self._batches, self._batch_first = name, iter(()), 0
            self._batch: pa.Array = pa.array([], kind)
            width = kind.list_size if pa.types.is_fixed_size_list(kind) else self._find_width()
        except ERRORS as error:
            raise UserError(
                f"{path} is damaged or is not a parquet file ({first_line(error)}); restore it"
            ) from None
        if not width:
            raise UserError(f"{path} holds no vector in {name}; give files with features")
        element = {"halffloat": "float16", "float": "float32", "double": "float64"}[str(_element(kind))]
        self.shape = Shape(int(self._firsts[-1]), width, element, name)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        values = np.zeros((len(rows), self.shape.width), np.dtype(self.shape.dtype))
        reasons: dict[int, str] = {}
        done = 0
        try:
            while done < len(rows):
                self._load(int(rows[done]))
                stop = self._batch_first + len(self._batch)
                count = int(np.searchsorted(rows[done:], stop))
                taken = self._batch.take(pa.array(rows[done : done + count] - self._batch_first))
                lengths = pc.list_value_length(taken).fill_null(0).to_numpy(zero_copy_only=False)
                whole = lengths == self.shape.width
                flat = taken.filter(pa.array(whole)).flatten()
                # A missing number becomes NaN.
                values[done : done + count][whole] = flat.to_numpy(zero_copy_only=False).reshape(
                    -1, self.shape.width
                )
                for i in np.flatnonzero(~whole).tolist():
                    reasons[done + i] = (
                        f"a vector of {lengths[i]} numbers, not {self.shape.width}"
                        if lengths[i]
                        else "no vector"
                    )
                done += count
        except ERRORS as error:
            raise UserError(
                f"{self._path} is damaged in {self._name} ({first_line(error)}); restore it"
            ) from None
        return values, reasons

    def _load(self, row: int) -> None:
        """Load the batch that holds a row."""
        if row < self._batch_first:
            self._batches, self._batch_first, self._batch = iter(()), 0, self._batch[:0]
        reopened = False
        while row >= self._batch_first + len(self._batch):
            following: pa.Array | None = next(self._batches, None)
            if following is None and not reopened:
                self._batches, reopened = self._open_batches(row), True
                self._batch_first = int(self._firsts[self._group(row)])
                following = next(self._batches, None)
            else:
                self._batch_first += len(self._batch)
            if following is None:
                raise ValueError(f"row {row} is missing")
            self._batch = following

    def _group(self, row: int) -> int:
        """Return the row group of a row."""
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def _open_batches(self, row: int) -> Iterator[pa.Array]:
        """Yield the column from the row group with a row on; raises ValueError where a group has other rows."""
        for group in range(self._group(row), self._file.num_row_groups):
            left = int(self._firsts[group + 1] - self._firsts[group])
            batches = self._file.iter_batches(_BATCH_ROWS, [group], columns=[self._name], use_threads=False)
            for batch in batches:
                left -= len(batch)
                if left < 0:
                    break
                column = batch.column(0)
                yield column.storage if isinstance(column, pa.ExtensionArray) else column
            if left:
                raise ValueError(f"row group {group} has other rows than its metadata states")

    def _find_width(self) -> int:
        """Return the length of the first list with a number in it, 0 without any."""
        for batch in self._open_batches(0) if self._firsts[-1] else ():
            lengths = pc.list_value_length(batch).fill_null(0).to_numpy(zero_copy_only=False)
            if lengths.any():
                return int(lengths[lengths > 0][0])
        return 0


def _choose(path: str, name: str, names: Any, likely: list[str], what: str) -> str:
    """Return the name that was given or the only likely one."""
    require_column(name, names, path)
    if not name and len(likely) != 1:
        raise UserError(
            f"{path} has several candidates for features ({some(likely)}); name one with --features"
            if likely
            else f"{path} has no {what} among {some(names)}; give files with features"
        )
    return name or likely[0]


def _storage(kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _element(kind: Any) -> Any:
    """Return the type of the floats of a list type, None for any other type."""
    kind = _storage(kind)
    is_list = any(
        test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )
    return kind.value_type if is_list and pa.types.is_floating(kind.value_type) else None


def _read_npy(path: str) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(local_path(path), mode="r")
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception as error:  # NumPy parses the header with Python's tokenizer, which raises many kinds
        raise UserError(
            f"{path} is damaged or is not an .npy file of numbers ({first_line(error)}); restore it"
        ) from None
    if array.dtype.kind != "f" or array.dtype.itemsize > 8 or array.ndim != 2 or not array.shape[1]:
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}; save features as floats [n, width]")
    if array.offset + array.nbytes != size(path):
        raise UserError(
            f"{path} is damaged: its {size(path):,} bytes are not those of {list(array.shape)}; restore it"
        )
    return array


def _read_tensors(path: str) -> list[np.ndarray]:
    """Return the features of a PyTorch file as consecutive arrays `[n, width]` that map the file."""
    found = read_torch_file(path)
    if isinstance(found, dict):
        if len(found) > 1 and any(_dimensions(value) != 1 for value in found.values()):
            names = ", ".join(str(key)[:50] for key in list(found)[:5])
            raise UserError(f"{path} holds several arrays ({names}); save only that of the images")
        found = list(found.values())
    values = [found] if isinstance(found, np.ndarray) else found
    if not isinstance(values, list) or not values or any(_dimensions(v) not in (1, 2) for v in values):
        raise UserError(
            f"{path} holds no features; save a tensor [n, width], or a list or dict of such or of vectors"
        )
    pieces = [value.reshape(-1, value.shape[-1]) for value in values]
    if sum(piece.nbytes for piece in pieces) > size(path):  # one tensor many times, or expanded
        raise UserError(f"{path} is damaged: its tensors are larger than the file; restore it")
    return pieces


def _dimensions(value: Any) -> int:
    return value.ndim if isinstance(value, np.ndarray) else -1


def is_float(dtype: np.dtype) -> bool:
    """Return whether vectors of a type can be features: floats of 2 to 8 bytes, or bfloat16."""
    return dtype == BFLOAT16 or (dtype.kind == "f" and dtype.itemsize <= 8)
