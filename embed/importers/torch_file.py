"""Reads the tensors of a file that `torch.save` wrote, without unpickling it.

The file is a zip of members that are not compressed: `NAME/data.pkl`, a pickle that says which tensors there are,
and `NAME/data/KEY`, the numbers of one storage each. A pickle is a program. Here its opcodes are read one by one,
and only those are carried out that put tensors into lists and dicts; whatever else it names is refused by that
name and never looked up.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_fast.data.features import BFLOAT16
from lit_fast.errors import UserError

_MAX_PICKLE = 16 << 20  # bytes
_STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": BFLOAT16,
}
_REBUILD, _ORDERED_DICT = "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"
_GLOBALS = {*_STORAGES, _REBUILD, _ORDERED_DICT}
_MARK = object()


class _Global(NamedTuple):
    name: str


class _Refused(ValueError):
    """The file is not what `torch.save` writes for tensors; the message says why."""


def read_torch_file(path: Path) -> Any:
    """What the file holds: an array, or a list, tuple or dict of such; arrays are views of the mapped file.

    Raises:
      UserError: it is not a zip of torch's, is damaged, or holds anything but float tensors, lists and dicts.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).read()
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is not a file of torch's zip format, or is damaged; one of the old format becomes one by "
            "torch.save(torch.load(FILE), FILE)"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except _Refused as error:
        raise UserError(f"{path} cannot be read without running what it holds: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, struct.error,
            NotImplementedError) as error:  # fmt: skip
        raise UserError(f"{path} is damaged: {type(error).__name__} {str(error)[:200]}") from None


class _Reader:
    """An open file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._bytes = np.memmap(path, np.uint8, "r")
        self._members = {info.filename: info for info in archive.infolist()}

    def read(self) -> Any:
        pickles = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _Refused("it has no data.pkl, or several")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in self._members and self._member("byteorder").tobytes() != b"little":
            raise _Refused("its numbers are big-endian")
        pickle = self._member("data.pkl")
        if len(pickle) > _MAX_PICKLE:
            raise _Refused(f"its data.pkl has more than {_MAX_PICKLE >> 20} MiB")
        return self._run(pickle.tobytes())

    def _member(self, name: str) -> np.ndarray:
        """The bytes of a member, which must be stored as they are."""
        info = self._members[self._folder + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise _Refused(f"{name} is compressed or encrypted")
        head = self._bytes[info.header_offset : info.header_offset + 30].tobytes()
        signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", head)
        start = info.header_offset + 30 + name_bytes + extra_bytes
        if signature != b"PK\3\4" or start + info.file_size > len(self._bytes):
            raise ValueError(f"{name} is cut off")
        return self._bytes[start : start + info.file_size]

    def _run(self, pickle: bytes) -> Any:
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        value: Any
        for opcode, value, _ in pickletools.genops(pickle):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(_MARK)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE":
                    stack.append(value)
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
                case "TUPLE":
                    stack.append(tuple(_since_mark(stack)))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(_last(stack, int(opcode.name[-1]))))
                case "APPEND" | "APPENDS":
                    items = _since_mark(stack) if opcode.name == "APPENDS" else _last(stack, 1)
                    _top(stack, list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = _since_mark(stack) if opcode.name == "SETITEMS" else _last(stack, 2)
                    if not all(type(name) in (str, int) for name in items[::2]):
                        raise _Refused("a dict has names that are neither text nor numbers")
                    _top(stack, dict).update(zip(items[::2], items[1::2], strict=True))
                case "GLOBAL":
                    stack.append(_allowed(value.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    stack.append(_allowed(".".join(_last(stack, 2))))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE":
                    function, arguments = _last(stack, 2)
                    stack.append(_called(function, arguments))
                case name:
                    raise _Refused(f"its pickle uses the opcode {name}, which no file of tensors needs")
        raise ValueError("the pickle has no end")

    def _storage(self, given: Any) -> np.ndarray:
        """The numbers of a storage, one-dimensional."""
        kind, storage, key, _, count = given
        known = isinstance(storage, _Global) and storage.name in _STORAGES
        if kind != "storage" or not known or type(key) is not str:
            raise _Refused("it refers to something other than a storage")
        dtype, data = _STORAGES[storage.name], self._member(f"data/{key}")
        if type(count) is not int or not 0 <= count * dtype.itemsize <= len(data):
            raise ValueError(f"data/{key} has fewer numbers than it should")
        return data[: count * dtype.itemsize].view(dtype)


def _allowed(name: str) -> _Global:
    if name not in _GLOBALS:
        raise _Refused(f"it names {name[:200]!a}; only lists and dicts of float tensors are read")
    return _Global(name)


def _called(function: Any, arguments: Any) -> Any:
    if function == _Global(_ORDERED_DICT) and arguments == ():
        return {}
    if function != _Global(_REBUILD):
        raise _Refused("it calls something other than the maker of a tensor")
    storage, offset, shape, strides = arguments[:4]
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, np.ndarray) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("a tensor of no storage or shape")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError("a tensor with a wrong shape")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if count > len(storage) or (count and last >= len(storage)):  # the former: an expanded one
        raise ValueError("a tensor is larger than its storage")
    if not count:
        return np.zeros(shape, storage.dtype)
    steps = [s * storage.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _since_mark(stack: list[Any]) -> list[Any]:
    place = next((i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK), None)
    if place is None:
        raise ValueError("the pickle has no mark")
    items = stack[place + 1 :]
    del stack[place:]
    return items


def _last(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    if len(items) != count:
        raise ValueError("the pickle's stack is empty")
    del stack[-count:]
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise ValueError(f"the pickle adds to something that is no {kind.__name__}")
    return stack[-1]
