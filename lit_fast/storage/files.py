"""Small files written so that they are whole or absent, and digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lit_fast.errors import UserError

_MOST_LINES = 16 << 20  # bytes


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that a reader, or a machine that lost power, sees all of it or none.

    Temporary file in the same directory, fsync, rename, fsync of the directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `json_bytes`."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Readable JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
      UserError: the file is absent, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from None


def read_object(path: Path, *keys: str, **types: type) -> dict[str, Any]:
    """`read_json` of an object that has the given keys, and those of `types`, where it has them, of that type.

    Raises:
      UserError: also if it is something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object")
    missing = [k for k in keys if k not in value]
    if missing:
        raise UserError(f"{path} is damaged: {missing[0]} is missing")
    for name, kind in types.items():
        if name in value and type(value[name]) is not kind:
            raise UserError(f"{path} is damaged: {name} is {str(value[name])[:80]!r}")
    return value


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a UTF-8 file, stripped; the empty ones at its end do not count.

    Raises:
      UserError: it cannot be read, is larger than 16 MiB, or has an empty line, which would shift the others.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_LINES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if len(data) > _MOST_LINES:
        raise UserError(f"{path} is larger than 16 MiB; give one name or template a line")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise UserError(f"{path} is empty; give one name or template a line")
    if not all(lines):
        raise UserError(f"{path} is empty in line {lines.index('') + 1}; each line stands for one")
    return tuple(lines)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
