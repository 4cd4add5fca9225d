"""Formats that are not read: what they are and what to do with them."""

from __future__ import annotations

from typing import NamedTuple

from lit_fast.embed.sources.interface import IMAGE_SUFFIXES
from lit_fast.storage.paths import suffix


class _Unread(NamedTuple):
    suffixes: tuple[str, ...]
    beginnings: tuple[bytes, ...]
    what: str
    remedy: str


_UNPACK = "unpack it and give the directory"
_DECOMPRESS = "decompress it"
_CONVERT = "convert it to parquet or tars"
_FORMATS = (
    _Unread(
        IMAGE_SUFFIXES,
        (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM"),
        "one image",
        "give its directory, or a table that names it",
    ),
    _Unread((".npy", ".npz"), (b"\x93NUMPY",), "a NumPy file", "for features: lit-fast import-features"),
    _Unread((".safetensors",), (), "a safetensors file", "for features: lit-fast import-features"),
    _Unread(
        (".pkl", ".pickle", ".pt", ".pth"), (b"\x80\x04\x95",), "a pickle", "write parquet or tars instead"
    ),
    _Unread((".zip",), (b"PK\x03\x04", b"PK\x05\x06"), "a ZIP archive", _UNPACK),
    _Unread((".7z",), (b"7z\xbc\xaf\x27\x1c",), "a 7z archive", _UNPACK),
    _Unread((".rar",), (b"Rar!",), "a RAR archive", _UNPACK),
    _Unread((".gz", ".tgz"), (b"\x1f\x8b",), "compressed with gzip", _DECOMPRESS),
    _Unread((".bz2", ".tbz2"), (b"BZh",), "compressed with bzip2", _DECOMPRESS),
    _Unread((".xz", ".txz"), (b"\xfd7zXZ",), "compressed with xz", _DECOMPRESS),
    _Unread((".zst", ".tzst"), (b"\x28\xb5\x2f\xfd",), "compressed with zstd", _DECOMPRESS),
    _Unread((".h5", ".hdf5"), (b"\x89HDF",), "an HDF5 file", _CONVERT),
    _Unread((".mdb", ".lmdb"), (), "an LMDB database", _CONVERT),
    _Unread((".db", ".sqlite", ".sqlite3"), (b"SQLite format 3",), "an SQLite database", "export a .csv"),
    _Unread((".rec",), (), "an MXNet record file", _CONVERT),
    _Unread((".beton",), (), "an FFCV file", "give the data that it was made from"),
    _Unread(
        (".arrow", ".feather"),
        (b"ARROW1", b"\xff\xff\xff\xff"),
        "an Arrow file",
        "write parquet, as with datasets.load_from_disk(DIRECTORY).to_parquet(FILE)",
    ),
    _Unread((".xlsx", ".xls", ".ods"), (), "a spreadsheet", "export a .csv"),
)


def unread_format(path: str, start: bytes = b"") -> str:
    """Return a problem and an action for a file of a format that is not read, by its suffix or its first bytes.

    Returns:
      "is a ZIP archive, which is not read; unpack it and give the directory", or "" for an unknown format.
    """
    known = [f for f in _FORMATS if suffix(path) in f.suffixes]
    known += [f for f in _FORMATS if start.startswith(f.beginnings or (b"\0" * 1024,))]
    return f"is {known[0].what}, which is not read; {known[0].remedy}" if known else ""
