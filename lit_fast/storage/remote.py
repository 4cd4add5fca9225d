"""Files at https://, s3://, gs://, hf:// and other URLs that fsspec knows: sizes, listings and byte ranges.

Credentials are those that fsspec's packages find by themselves (environment, configuration files, `hf auth login`).
Failures that may pass are retried with growing pauses; others are one line.
"""

from __future__ import annotations

import base64
import io
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lit_fast.errors import UserError, first_line
from lit_fast.storage.hub import hub_problem, silence_retries
from lit_fast.storage.paths import is_bucket, refuse_url

# s3fs retries a few times by itself, gcsfs six times, huggingface_hub five times.
ATTEMPTS = {"http": 6, "https": 6, "s3": 3, "gs": 1, "hf": 1}
_ATTEMPTS = 3  # of other protocols
# What fsspec knows beside servers of files: the local disk, and systems within another one.
_NO_SERVERS = {
    "file", "local", "dir", "data", "git", "dvc", "dask", "generic", "reference", "zip", "tar", "libarchive", "cached",
    "blockcache", "filecache", "simplecache", "async_wrapper", "asyncwrapper", "asynclocal", "pyscript",
}  # fmt: skip
_PACKAGES = {
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol",
    "oss": "ossfs", "oci": "ocifs", "webdav": "webdav4", "webhdfs": "requests", "root": "fsspec-xrootd",
    "lakefs": "lakefs-spec", "dropbox": "dropboxdrivefs", "gdrive": "gdrive-fsspec", "box": "boxfs",
}  # fmt: skip
PAUSE = 0.5  # seconds before the second attempt; doubles each time
_READ_AHEAD = 8 << 20
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "RefreshError",
    "TokenRetrievalError",
    "AuthenticationException",  # paramiko
    "ClientAuthenticationError",  # azure
}

T = TypeVar("T")


def check_protocol(url: str) -> None:
    """Raise UserError if there is no package for the protocol of a URL."""
    _with_retries(url, lambda: _filesystem(url))


def stat(url: str) -> tuple[int, str]:
    """Return the bytes and the ETag of a remote file; "" where the server sends no ETag.

    Raises:
      UserError: it does not exist, may not be read, or its server does not answer range requests.
    """
    info = _with_retries(url, lambda: _info(url))
    if info.get("type") == "directory":
        raise UserError(f"{url} is a directory; name the files in it or give a pattern, or {url}/ for images")
    size, etag = info.get("size"), str(info.get("ETag") or info.get("etag") or "")
    if urlsplit(url).scheme not in ATTEMPTS:
        etag = etag or str(info.get("mtime") or info.get("last_modified") or info.get("created") or "")
    if not isinstance(size, int):
        raise UserError(f"{url} has no size: its server does not send one; download it first")
    if url.startswith("http"):
        _check_ranges(url)
    return size, etag


def read_range(url: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a remote file from `offset` on; from any thread.

    Raises:
      UserError: it cannot be read, or has become shorter.
    """
    options = {"cache_type": "none"} if urlsplit(url).scheme == "hf" else {}  # it would read ahead
    data = _with_retries(
        url, lambda: _filesystem(url).cat_file(url, start=offset, end=offset + size, **options)
    )
    if len(data) < size:
        raise UserError(f"{url} has become shorter since it was indexed; restore it")
    if len(data) > size:
        raise UserError(f"{url} cannot be read by ranges: its server ignores them; download it first")
    return data


def read_whole(url: str, limit: int) -> bytes | None:
    """Return the content of a remote file of at most `limit` bytes; None where there is no such file."""
    info = _with_retries(url, lambda: _info(url), absent=True)
    if info is None or info.get("type") == "directory":
        return None
    if (info.get("size") or 0) > limit:
        raise UserError(f"{url} has more than {limit:,} bytes; give a smaller file")
    return _with_retries(url, lambda: _filesystem(url).cat_file(url), absent=True)


def open_remote(url: str) -> io.BufferedReader:
    """Open a remote file for reading bytes at any position, in ranges of 8 MiB."""
    return io.BufferedReader(_RemoteFile(url), _READ_AHEAD)


def listing(pattern: str) -> list[str]:
    """Return the URLs that match a pattern with `*`, `**` or `?`, or are in a directory that ends with `/`.

    Raises:
      UserError: the protocol has no listings.
    """
    scheme = urlsplit(pattern).scheme
    if scheme in ("http", "https"):
        raise UserError(
            f"source {pattern} cannot be listed over {scheme}; name the files, as in {{00000..00099}}.tar"
        )
    found = _with_retries(pattern, lambda: _glob(f"{pattern}*" if pattern.endswith("/") else pattern))
    start, inside = _root(pattern)
    return sorted(start + name[inside:] for name, info in found.items() if info.get("type") == "file")


def file_sizes(url: str) -> dict[str, int]:
    """Return the bytes of every file below a directory by relative name, sorted; {} where there is none.

    Raises:
      UserError: the protocol has no listings.
    """
    if url.startswith("http"):
        raise UserError(f"{url} cannot be listed over {urlsplit(url).scheme}; name the files")
    url = url.rstrip("/")

    def find() -> Mapping[str, Mapping[str, Any]]:
        files = _filesystem(url)
        files.invalidate_cache()
        return files.find(url, detail=True)

    start, inside = _root(url)
    found = {
        start + name[inside:]: info for name, info in (_with_retries(url, find, absent=True) or {}).items()
    }
    return {
        name.removeprefix(f"{url}/"): int(info.get("size") or 0)
        for name, info in sorted(found.items())
        if name.startswith(f"{url}/") and not name.endswith("/")  # some servers have objects for directories
    }


def directory_size(url: str) -> int:
    """Return the bytes of all files below a URL."""
    return sum(file_sizes(url).values())


def _root(url: str) -> tuple[str, int]:
    """Return the beginning of the URLs of a file system, and the length of what its own names have in its place."""
    scheme = urlsplit(url).scheme
    if scheme in ATTEMPTS:
        return f"{scheme}://", 0
    path = _with_retries(url, lambda: _open_url(url)[1])
    rest = path if url.endswith(path) else path.lstrip("/").partition("/")[2]
    return url[: len(url) - len(rest)], len(path) - len(rest)


def md5(url: str) -> str:
    """Return the hexadecimal MD5 of a file in a bucket of Google's, "" where the server does not send it."""
    _, headers = _with_retries(url, lambda: _first_byte(url))
    found = re.search(r"md5=([\w+/]{22}==)", headers.get("x-goog-hash", ""))
    return base64.b64decode(found[1]).hex() if found else ""


class _RemoteFile(io.RawIOBase):
    """A remote file whose every read is a range request."""

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._size, _ = stat(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        if size:
            buffer[:size] = read_range(self._url, self._position, size)
            self._position += size
        return size


def _with_retries(url: str, work: Callable[[], T], *, absent: bool = False) -> T | Any:
    """Return `work()`, retried after failures that may pass; None where `absent` and there is no such file."""
    attempts = ATTEMPTS.get(urlsplit(url).scheme.lower(), _ATTEMPTS)
    for attempt in range(attempts):
        try:
            return work()
        except UserError:
            raise
        except ImportError:
            package = _PACKAGES.get(urlsplit(url).scheme, "'lit-fast[remote]'")
            raise UserError(f"{url} needs more packages; run: pip install {package}") from None
        except Exception as raised:  # the packages under fsspec raise many kinds
            error = _true_error(raised) if url.startswith("http") else raised
            if absent and isinstance(error, FileNotFoundError):
                return None
            if problem := _permanent_problem(url, error):
                raise UserError(f"{url} {problem}") from None
            last = error
        if attempt < attempts - 1:
            time.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1.5))  # random, so that threads spread
    raise UserError(
        f"{url} cannot be read after several attempts: {first_line(last)}; rerun the same command later"
    )


def _true_error(error: BaseException) -> BaseException:
    """Return the cause of a FileNotFoundError that fsspec raises for any failure of a HEAD request over HTTP."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    passing = getattr(cause, "status", 404) not in (404, 410) or isinstance(cause, OSError | TimeoutError)
    return cause if passing else error


def _permanent_problem(url: str, error: BaseException) -> str:
    """Return the problem of a failure that will not pass, "" of one that may."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None and len(causes) < 5:
        causes.append(causes[-1].__cause__)
    if urlsplit(url).scheme == "hf" and (problem := _hub_problem(url, causes)) is not None:
        return problem
    names = {type(cause).__name__ for cause in causes}
    if "ClientPayloadError" in names:  # aiohttp's name for a cut connection; its cause claims the status 400
        return ""
    status = next((s for c in causes if (s := _status(c))), 0)
    if isinstance(error, PermissionError) or names & _NO_CREDENTIALS or status in (401, 403):
        public = {"s3": "FSSPEC_S3_ANON=true", "gs": "FSSPEC_GS_TOKEN=anon"}.get(urlsplit(url).scheme)
        hint = f", or set {public} for a public bucket" if public else ""
        return f"may not be read ({status or first_line(error)}); check the credentials{hint}"
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "does not exist; check the address"
    if 400 <= status < 500 and status not in (408, 425, 429):
        return f"cannot be read: its server answers {status}; check the address"
    if isinstance(error, (ValueError, TypeError)) and not status:
        return f"cannot be read: {first_line(error)}; check the address"
    return ""


def _status(error: BaseException) -> int:
    """Return the HTTP status that an exception of one of fsspec's packages has, 0 without one."""
    found = [getattr(error, name, None) for name in ("status", "code", "status_code")]
    return next((value for value in found if isinstance(value, int)), 0)


def _hub_problem(url: str, causes: list[BaseException]) -> str | None:
    """Return the problem of an exception of huggingface_hub as `_permanent_problem`, None of any other."""
    from huggingface_hub import errors

    for cause in causes:
        if isinstance(cause, errors.EntryNotFoundError):
            return "does not exist; check the address"
        status = cause.response.status_code if type(cause) is errors.HfHubHTTPError else 0
        if status in (408, 429) or status >= 500:
            return ""
        if isinstance(cause, errors.HfHubHTTPError | errors.HFValidationError | errors.OfflineModeIsEnabled):
            kind, owner, name = f"{url.removeprefix('hf://')}//".split("/")[:3]
            if kind == "datasets":
                return hub_problem(cause, f"{owner}/{name.partition('@')[0]}", "dataset")
            return hub_problem(cause, f"{kind}/{owner.partition('@')[0]}")
    return None


def _filesystem(url: str) -> Any:
    scheme = urlsplit(url).scheme.lower()
    if scheme in ("gs", "s3", "gcs", "s3a") and not is_bucket(url):
        refuse_url(url)
    if scheme not in ATTEMPTS:
        return _open_url(url)[0]
    if url.startswith("hf://buckets/"):
        raise UserError(
            f"{url} is in a bucket of the Hub; give a repository, as in hf://datasets/OWNER/NAME/FILE"
        )
    return _open_filesystem(scheme)


def _open_url(url: str) -> tuple[Any, str]:
    """Return the file system of a protocol without special treatment here, and its own name for a URL."""
    from fsspec.core import url_to_fs
    from fsspec.registry import available_protocols

    scheme = urlsplit(url).scheme
    if scheme in _NO_SERVERS or scheme not in available_protocols() or "::" in url:
        raise UserError(
            f"{url} cannot be read; give a local path or a URL with https://, http://, s3://, gs://, hf:// or another "
            "protocol of fsspec, such as az://"
        )
    files, path = url_to_fs(url)
    return files, str(path)


@cache
def _open_filesystem(scheme: str) -> Any:
    import fsspec

    silence_retries()
    for package in ("gcsfs", "s3fs", "aiobotocore", "botocore"):
        # They print tracebacks of failures that are handled here.
        logging.getLogger(package).setLevel(logging.CRITICAL + 1)
    if scheme in ("http", "https"):
        import aiohttp

        # No limit on the whole of a request, only on silence; and no compression, which has no ranges.
        silence = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        options = {"timeout": silence, "headers": {"Accept-Encoding": "identity"}}
        return fsspec.filesystem(scheme, client_kwargs=options, use_listings_cache=False)
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


def _info(url: str) -> Mapping[str, Any]:
    """Return `size`, `type` and an ETag of a remote file, never from a cache."""
    files = _filesystem(url)
    if urlsplit(url).scheme != "hf":
        return files.info(url)
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder

    at = files.resolve_path(url)
    found = HfApi().get_paths_info(
        at.repo_id, [at.path_in_repo], revision=at.revision, repo_type=at.repo_type
    )
    if not found:
        raise FileNotFoundError(url)
    if isinstance(found[0], RepoFolder):
        return {"type": "directory"}
    return {"size": found[0].size, "etag": found[0].blob_id, "type": "file"}


def _glob(pattern: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the metadata of the files and directories that match a pattern, never from a cache."""
    files = _filesystem(pattern)
    if urlsplit(pattern).scheme not in ("http", "https", "s3", "gs"):
        files.invalidate_cache()
    return files.glob(pattern, detail=True)


_range_servers: set[tuple[str, str]] = set()  # scheme and address of servers that are known to answer ranges


def _check_ranges(url: str) -> None:
    """Refuse a server that would send the whole file for every image; requested once per server."""
    server = urlsplit(url)[:2]
    if server in _range_servers:
        return
    if _with_retries(url, lambda: _first_byte(url))[0] == 200:
        raise UserError(f"{url} cannot be read by ranges: its server ignores them; download it first")
    _range_servers.add(server)


def _first_byte(url: str) -> tuple[int, Mapping[str, str]]:
    """Return the status and the headers of a request over HTTP for the first byte of a file."""
    from fsspec.asyn import sync

    files = _filesystem(url)

    async def answer() -> tuple[int, Mapping[str, str]]:
        session = await files.set_session()
        async with session.get(url, headers={"Range": "bytes=0-0"}) as response:
            response.raise_for_status()
            return response.status, response.headers

    return sync(files.loop, answer)
