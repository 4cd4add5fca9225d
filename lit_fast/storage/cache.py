"""The cache of files from buckets and web servers. Files of the Hugging Face Hub are in the Hub's own cache."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from contextlib import suppress

from lit_fast.errors import UserError
from lit_fast.storage import remote
from lit_fast.storage.files import (
    digest,
    is_file,
    list_names,
    local_path,
    remove_tree,
    replacing,
    write_atomic,
)
from lit_fast.storage.hub import offline
from lit_fast.storage.paths import StrPath, is_bucket, join, name
from lit_fast.utils.progress import Progress

_CHUNK = 8 << 20


def cache_directory() -> str:
    """Return `$LIT_FAST_CACHE`, else `$XDG_CACHE_HOME/lit_fast`, else `~/.cache/lit_fast`.

    A user without a home directory, as in containers, has `lit_fast-UID` in the directory of temporary files.

    Raises:
      UserError: that directory belongs to another user.
    """
    directory = os.environ.get("LIT_FAST_CACHE") or join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lit_fast"
    )
    directory = os.path.expanduser(directory)
    if directory.startswith("~"):
        directory = join(tempfile.gettempdir(), f"lit_fast-{os.getuid()}")
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        if os.lstat(directory).st_uid != os.getuid():
            raise UserError(f"cache {directory} belongs to another user; set LIT_FAST_CACHE to a directory")
    return directory


def local_directory(purpose: str, location: StrPath, root: str = "") -> str:
    """Return the directory for local files that belong to a location in a bucket.

    Args:
      purpose: what the files are; a directory below `root`.
      root: a local directory; "": the cache.
    """
    digest = hashlib.blake2b(os.fspath(location).encode(), digest_size=16).hexdigest()
    return join(local_path(root) or cache_directory(), purpose, digest)


def local_copy(location: StrPath) -> str:
    """Return the path of a local file, or of a copy of a file in a bucket, for libraries that open files themselves.

    A copy is in the cache under the object's generation, so a file that has been replaced is copied again.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it cannot be read.
    """
    if not is_bucket(location):
        if not is_file(location):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location)
        return local_path(location)
    from lit_fast.storage import buckets

    url = os.fspath(location)
    directory = local_directory("buckets", url)
    found = buckets.generation(url)
    path = join(directory, found.hex()[-64:], name(url))
    if found != buckets.ABSENT and is_file(path):
        return path
    data, found = buckets.read(url)
    if data is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    current = found.hex()[-64:]
    write_atomic(join(directory, current, name(url)), data)
    for other in list_names(directory):
        if other != current:
            remove_tree(join(directory, other))
    return join(directory, current, name(url))


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
        raise UserError(f"{spec} cannot be downloaded: {error}; {action}") from None
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
            raise UserError(f"{url} changed while it was downloaded; try again")
        expected = sha256 or remote.md5(url)
        found = digest(temporary, "sha256" if sha256 else "md5")
        if expected and found != expected:
            raise UserError(f"{url} has the digest {found}, not {expected}; try again, or give a local file")
