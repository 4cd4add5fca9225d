"""The cache of files from buckets and web servers. Files of the Hugging Face Hub are in the Hub's own cache."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
from contextlib import suppress

from lit_fast.errors import UserError
from lit_fast.storage import remote
from lit_fast.storage.atomic import replacing, write_atomic
from lit_fast.storage.files import buckets, digest, is_file, list_names, local_path, remove_tree
from lit_fast.storage.hub import offline
from lit_fast.storage.paths import StrPath, is_bucket, is_url, join, name
from lit_fast.utils.output import status
from lit_fast.utils.progress import Progress

_CHUNK = 8 << 20
_PART = 64 << 20


def cache_directory() -> str:
    """Return `$LIT_FAST_CACHE`, else `$XDG_CACHE_HOME/lit_fast`, else `~/.cache/lit_fast`.

    A user without a home directory, as in containers, has `lit_fast-UID` in the directory of temporary files.

    Raises:
      UserError: it is a URL, or that directory belongs to another user.
    """
    directory = os.environ.get("LIT_FAST_CACHE") or join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lit_fast"
    )
    try:
        directory = os.path.expanduser(local_path(directory))
    except UserError as error:
        raise UserError(f"LIT_FAST_CACHE: {error}") from None
    if directory.startswith("~"):
        directory = join(tempfile.gettempdir(), f"lit_fast-{os.getuid()}")
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        if os.lstat(directory).st_uid != os.getuid():
            raise UserError(
                f"cache {directory} belongs to another user; set LIT_FAST_CACHE to a directory of yours"
            )
    return directory


def local_directory(purpose: str, location: StrPath, root: str = "") -> str:
    """Return the directory for local files that belong to a location in a bucket.

    Args:
      purpose: what the files are; a directory below `root`.
      root: a local directory; "": the cache.
    """
    digest = hashlib.blake2b(os.fspath(location).encode(), digest_size=16).hexdigest()
    return join(local_path(root) or cache_directory(), purpose, digest)


def local_copy(location: StrPath, *, in_parts: bool = False) -> str:
    """Return the path of a local file, or of a copy of a remote one, for libraries that open files themselves.

    A copy is in the cache under the object's generation or ETag, so a file that has been replaced is copied again.

    Args:
      location: a path or URL.
      in_parts: whether a file in a bucket may be too large to be held in memory.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read.
    """
    if not is_url(location):
        if not is_file(location):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location)
        return local_path(location)
    url = os.fspath(location)
    directory = local_directory("buckets" if is_bucket(url) else "remote", url)
    with _lock_of(url):
        version = _version(url)
        path = join(directory, version, name(url))
        if is_file(path):
            return path
        if not is_bucket(url):
            _download(url, path, "")
        elif in_parts:
            status(f"copying {url} to the cache")
            _copy_in_parts(url, path, version)
        else:
            data, found = buckets().read(url)
            if data is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
            version = _name_of(found)
            path = join(directory, version, name(url))
            write_atomic(path, data)
        for other in list_names(directory):
            if other != version:
                remove_tree(join(directory, other))
        return path


_locks: dict[str, threading.Lock] = {}


def _lock_of(url: str) -> threading.Lock:
    return _locks.setdefault(url, threading.Lock())


def _version(url: str) -> str:
    """Return a name for the present content of a remote file; raises FileNotFoundError where there is none."""
    if not is_bucket(url):
        return hashlib.blake2b(repr(remote.stat(url)).encode(), digest_size=16).hexdigest()
    found = buckets().generation(url)
    if found == buckets().ABSENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return _name_of(found)


def _name_of(generation: bytes) -> str:
    return generation.hex()[-64:]


def _copy_in_parts(url: str, path: str, version: str) -> None:
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            while True:
                start = file.tell()
                try:
                    file.write(buckets().read_range(url, start, start + _PART))
                except ValueError:  # less than a part is left
                    with suppress(ValueError):  # nothing is left
                        file.write(buckets().read_range(url, start, None))
                    break
        if _version(url) != version:
            raise UserError(f"{url} changed while it was copied; rerun the same command")


def cached_file(spec: str, url: str, path_in_cache: str, sha256: str = "") -> str:
    """Return the path of a file in the cache, downloading it from `url` unless it is there.

    Args:
      spec: the name that the user gave, for messages.
      url: an http or https address.
      path_in_cache: the file's path below the cache directory.
      sha256: its digest; "": it must have the MD5 that the server sends, if any.

    Raises:
      UserError: it cannot be downloaded, no request may be made, or it has another digest.
    """
    path = join(cache_directory(), path_in_cache)
    if is_file(path):
        return path
    action = f"download {url} to {path} on another machine, or give the path of a local file"
    if offline():
        raise UserError(f"{spec} is not in the cache and no request may be made (offline); {action}")
    try:
        _download(url, path, sha256)
    except UserError as error:
        raise UserError(f"{spec} cannot be downloaded: {error}, or {action}") from None
    return path


def _download(url: str, path: str, sha256: str) -> None:
    """Copy a remote file in ranges, each of which is retried, and check its digest before it gets its name."""
    with replacing(path) as temporary:
        with remote.open_remote(url) as source, open(temporary, "wb") as file:
            size, etag = remote.stat(url)
            progress = Progress(f"download {name(path)}", size // 1_000_000, "MB")
            while chunk := source.read(_CHUNK):
                file.write(chunk)
                progress.advance(file.tell() // 1_000_000 - progress.done)
            if size >= 1_000_000:
                progress.close()
        if remote.stat(url) != (size, etag):
            raise UserError(f"{url} changed while it was downloaded; rerun the same command")
        expected = sha256 or (remote.md5(url) if url.startswith("http") else "")
        found = digest(temporary, "sha256" if sha256 else "md5")
        if expected and found != expected:
            raise UserError(
                f"{url} has the digest {found}, not {expected}; rerun the same command, or give a local file"
            )
