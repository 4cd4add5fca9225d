"""Read and write files of JSON and text, local or in buckets; read those at other URLs."""

from __future__ import annotations

import json
from typing import Any

from lit_fast.errors import UserError, unreadable
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import exists, read_bytes, read_whole
from lit_fast.storage.paths import StrPath

MAX_TEXT_BYTES = 16 << 20


def read_text(location: StrPath, limit: int = MAX_TEXT_BYTES) -> str | None:
    """Return the content of a UTF-8 file or URL, without a byte order mark; None where there is none.

    Raises:
      UserError: it is not UTF-8, has more than `limit` bytes, or cannot be read.
    """
    data = read_whole(location, limit)
    try:
        return None if data is None else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{location} is not UTF-8 text ({error}); save it as UTF-8") from None


def read_lines(location: StrPath) -> tuple[str, ...]:
    """Return the lines of a UTF-8 file or URL, stripped, without empty ones at its end.

    Raises:
      UserError: it is absent or empty, cannot be read, is larger than 16 MiB, or has an empty line between others.
    """
    text = read_text(location)
    if text is None:
        problem = "is a directory" if exists(location) else "does not exist"
        raise UserError(f"{location} {problem}; give a file with one name or template per line")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise UserError(f"{location} is empty; give one name or template per line")
    if not all(lines):
        raise UserError(
            f"{location} is empty in line {lines.index('') + 1}; give one name or template per line"
        )
    return tuple(lines)


def read_json(location: StrPath) -> Any:
    """Parse a JSON file.

    Raises:
      UserError: the file is absent, unreadable or not JSON.
    """
    try:
        return json.loads(read_bytes(location))
    except FileNotFoundError:
        raise UserError(f"{location} does not exist; restore it") from None
    except OSError as error:
        raise unreadable(location, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is damaged: not JSON ({error}); restore it") from None


def read_object(location: StrPath, *keys: str, **types: type) -> dict[str, Any]:
    """Parse a JSON object that has the given keys, and those of `types`, where present, of that type.

    Raises:
      UserError: as `read_json`, or the file holds something else.
    """
    value = read_json(location)
    if not isinstance(value, dict):
        raise UserError(f"{location} is damaged: it is not a JSON object; restore it")
    missing = [k for k in keys if k not in value]
    if missing:
        raise UserError(f"{location} is damaged: {missing[0]} is missing; restore it")
    for key, kind in types.items():
        if key in value and type(value[key]) is not kind:
            raise UserError(f"{location} is damaged: {key} is {str(value[key])[:80]!r}; restore it")
    return value


def json_bytes(value: Any) -> bytes:
    """Return indented JSON with a final newline.

    The bytes of a file name that are no UTF-8, surrogates in Python, become the escapes that JSON has for them.
    """
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(location: StrPath, value: Any) -> None:
    """Write `json_bytes` of a value atomically."""
    write_atomic(location, json_bytes(value))
