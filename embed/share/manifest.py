"""`lit_fast.json` of a repository: the files of a dataset with their sizes and digests; uploaded last.

A file of any other name is not part of the dataset and is never downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from lit_fast.data.dataset import compact_json
from lit_fast.errors import UserError
from lit_fast.storage.hub_dataset import FileDigest
from lit_fast.version import __version__

NAME = "lit_fast.json"
MAX_BYTES = 256 << 20  # of this file

_FORMAT = 1
_STORE = r"(?P<store>(?!\.)[^/\\\x00-\x1f]{1,200})"
_RECORDS = r"\d{5,}\.array_record"
_PATHS = re.compile(
    rf"dataset\.json|left_out(-\d+)?\.jsonl|(index|captions)(-\d+)?/{_RECORDS}"
    rf"|(?P<part>tokens)/{_STORE}/(tokens\.json|tokenizer\.model|{_RECORDS})",
    re.ASCII,
)
_FEATURES = re.compile(
    rf"(?P<part>features)/{_STORE}/(tower\.json|zarr\.json|c/\d+/0|manifest/\d{{5,}}\.json)", re.ASCII
)
_MAX_JSON = 256 << 20  # bytes of a file that is read as a whole


@dataclass(frozen=True)
class Manifest:
    """The content of `lit_fast.json`."""

    rows: int
    digest: str  # of the dataset
    files: dict[str, FileDigest]  # path -> size and digest

    def stores(self, part: str) -> list[str]:
        """Return the names of the stores of a part, "features" or "tokens"."""
        return sorted({name for kind, name in map(_store_of, self.files) if kind == part})

    def select(self, towers: Collection[str] | None, tokenizers: Collection[str] | None) -> Manifest:
        """Return the manifest without the other stores; None: all.

        Raises:
          UserError: there is no such store.
        """
        for part, wanted in (("features", towers), ("tokens", tokenizers)):
            if absent := sorted(set(wanted or ()) - set(self.stores(part))):
                known = ", ".join(self.stores(part))
                action = f"choose from {known}" if known else "leave the option out"
                raise UserError(f"the dataset has no {part} {absent[0]!r}; {action}")
        keep = {"features": towers, "tokens": tokenizers}
        files = {}
        for path, known_digest in self.files.items():
            part, name = _store_of(path)
            wanted = keep.get(part)
            if wanted is None or name in wanted:
                files[path] = known_digest
        return replace(self, files=files)

    def encode(self) -> bytes:
        """Return JSON."""
        files = {path: [file.size, file.sha256] for path, file in sorted(self.files.items())}
        about = {"format": _FORMAT, "lit_fast": __version__, "rows": self.rows, "digest": self.digest}
        return compact_json(about | {"files": files})


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest of a repository.

    Raises:
      UserError: it is damaged, of a later version, or names a file that is no part of a dataset.
    """
    try:
        value = json.loads(data)
        if value["format"] != _FORMAT:
            raise UserError(
                f"{where} has format {value['format']!r}, this version reads {_FORMAT}; update lit-fast"
            )
        rows, digest = value["rows"], value["digest"]
        files = {path: FileDigest(*entry) for path, entry in value["files"].items()}
        numbers = [rows, *(file.size for file in files.values())]
        if not all(type(n) is int and n >= 0 for n in numbers) or type(digest) is not str:
            raise ValueError("a count is not a whole number")
        if not all(re.fullmatch("[0-9a-f]{64}", file.sha256) for file in files.values()):
            raise ValueError("a digest is not a SHA-256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({type(error).__name__} {error}); ask its owner") from None
    for path, file in files.items():
        if not is_part(path):
            raise UserError(f"{where} names {path[:80]!r}, which is not a file of a dataset; ask its owner")
        if not path.endswith((".array_record", "/0")) and file.size > _MAX_JSON:
            raise UserError(f"{where} names {path[:80]!r} with {file.size:,} bytes; ask its owner")
    if "dataset.json" not in files:
        raise UserError(f"{where} names no dataset.json; ask its owner")
    return Manifest(rows, digest, files)


def is_part(path: str) -> bool:
    """Return whether a relative path is that of a file of a dataset."""
    return bool(_PATHS.fullmatch(path) or _FEATURES.fullmatch(path))


def _store_of(path: str) -> tuple[str, str]:
    match = _PATHS.fullmatch(path) or _FEATURES.fullmatch(path)
    return (match["part"] or "", match["store"] or "") if match else ("", "")
