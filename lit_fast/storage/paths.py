"""Paths and URLs as strings: join them, take them apart.

Code outside `lit_fast/storage/` treats a location as an opaque `str` and uses these functions and those of
`lit_fast.storage.files`, so that a location may become a URL without a change there.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from urllib.parse import urlsplit

from lit_fast.errors import UserError

StrPath = str | os.PathLike[str]

ELSEWHERE = "elsewhere://"  # begins the places of files that only another machine has
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Without the slashes these are taken for mistakes, not for the names of local files.
_MISTAKE = re.compile(r"(gcs|gs|s3a?|abfss?|adl|az|s?ftp|hdfs|https?|file):", re.IGNORECASE)
_BUCKETS = {"gs": "gs", "gcs": "gs", "s3": "s3", "s3a": "s3", "s3n": "s3"}
_JUNK = {  # names in lower case
    "__macosx",  # archives of macOS
    "icon\r",
    "thumbs.db",  # Windows
    "ehthumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "@eadir",  # Synology
    "#recycle",
    "lost+found",  # ext4
    "__pycache__",
}


def is_url(location: StrPath) -> bool:
    """Return whether a location begins with a scheme, like `s3://`; unknown schemes are refused when it is opened."""
    return _SCHEME.match(os.fspath(location)) is not None


def is_bucket(location: StrPath) -> bool:
    """Return whether a location is in a bucket, `gs://` or `s3://`, where files can be written too."""
    return os.fspath(location).startswith(("gs://", "s3://"))


def refuse_url(location: StrPath) -> None:
    """Raise UserError if a location is a URL, or one with a mistake, as it would become a local directory."""
    location = os.fspath(location)
    if not _MISTAKE.match(location) and not is_url(location):
        return
    if is_bucket(location):
        raise UserError(f"{location} is in a bucket, where this cannot be; give a local path")
    if scheme := _BUCKETS.get(location.partition(":")[0].lower()):
        raise UserError(
            f"{location} is not a URL of a bucket; write {scheme}://BUCKET/NAME, or ./{location} for a local path"
        )
    raise UserError(
        f"{location} is a URL that cannot be used here; give a local path, gs://BUCKET/NAME or s3://BUCKET/NAME"
    )


def is_pattern(location: StrPath) -> bool:
    """Return whether a location has `*`, `?` or `[..]`."""
    return glob.has_magic(os.fspath(location))


def join(location: StrPath, *names: str) -> str:
    """Append names to a path or URL."""
    location = os.fspath(location)
    return posixpath.join(location, *names) if is_url(location) else os.path.join(location, *names)


def parent(location: StrPath) -> str:
    """Return the directory of a path, or the URL up to its last slash without the query.

    A URL without a path is its own parent.
    """
    location = os.fspath(location)
    if not is_url(location):
        return os.path.dirname(location) or "."
    url = _without_query(location)
    return url if url.count("/") == 2 else posixpath.dirname(url)


def name(location: StrPath) -> str:
    """Return the last part of a path or URL."""
    location = os.fspath(location)
    return posixpath.basename((_without_query(location) if is_url(location) else location).rstrip("/"))


def stem(location: StrPath) -> str:
    """Return the last part without its suffix."""
    return os.path.splitext(name(location))[0]


def suffix(location: StrPath) -> str:
    """Return the suffix of the last part with its dot, in lower case; "" without one."""
    return os.path.splitext(name(location))[1].lower()


def is_junk(relative: str) -> bool:
    """Return whether a relative path has a hidden part, or one that an operating system or an editor leaves behind."""
    parts = relative.split("/")
    return any(
        part.lower() in _JUNK
        or (part.startswith(".") and part not in (".", ".."))
        or part.startswith("~$")
        or part.endswith("~")
        for part in parts
    )


def absolute(location: StrPath) -> str:
    """Make a local path absolute and resolve symbolic links; return a URL unchanged.

    Raises:
      UserError: it is a URL with a mistake.
    """
    location = os.fspath(location)
    if is_url(location):
        return location
    refuse_url(location)
    return os.path.realpath(location)


def _without_query(url: str) -> str:
    if not url.startswith("http"):  # elsewhere ? and # are part of names
        return url
    return urlsplit(url)._replace(query="", fragment="").geturl()
