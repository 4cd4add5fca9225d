"""Files at https://, http://, s3:// and gs:// through fsspec: sizes, lists and ranges of bytes.

Credentials are what fsspec's packages find by themselves (environment, configuration files). What may pass is
tried again with growing pauses; what will not is one line.
"""

from __future__ import annotations

import io
import logging
import random
import re
import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lit_fast.errors import UserError

SCHEMES = ("https", "http", "s3", "gs")
ATTEMPTS = {"http": 6, "https": 6, "s3": 3, "gs": 1}  # s3fs tries a few times by itself, gcsfs six times
PAUSE = 0.5  # seconds before the second attempt; doubles each time
_READ_AHEAD = 8 << 20

T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Whether `path` has a scheme, like `s3://bucket/name`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def stat(url: str) -> tuple[int, str]:
    """Bytes and ETag ("" where the server gives none) of a remote file.

    Raises:
      UserError: it does not exist, may not be read, or its server does not answer range requests.
    """
    info = _patiently(url, lambda: _filesystem(url).info(url))
    if info.get("type") == "directory":
        raise UserError(f"{url} is a directory; name the files in it or give a pattern")
    size, etag = info.get("size"), str(info.get("ETag") or info.get("etag") or "")
    if not isinstance(size, int):
        raise UserError(f"{url}: its server does not tell the size; download it first")
    if url.startswith("http"):
        _check_ranges(url)
    return size, etag


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of a remote file from `offset` on, from any thread.

    Raises:
      UserError: it cannot be read, or has become shorter.
    """
    data = _patiently(url, lambda: _filesystem(url).cat_file(url, start=offset, end=offset + size))
    if len(data) < size:
        raise UserError(f"{url} has become shorter since it was indexed; restore it")
    if len(data) > size:
        raise UserError(f"{url}: its server does not answer range requests; download it first")
    return data


def read_whole(url: str, limit: int) -> bytes | None:
    """A remote file of at most `limit` bytes; None if there is no such file."""
    try:
        info = _patiently(url, lambda: _filesystem(url).info(url), absent=True)
        if info is None or info.get("type") == "directory":
            return None
        if (info.get("size") or 0) > limit:
            raise UserError(f"{url} has more than {limit} bytes")
        return _patiently(url, lambda: _filesystem(url).cat_file(url), absent=True)
    except FileNotFoundError:
        return None


def open_remote(url: str) -> io.BufferedReader:
    """A seekable file; reads go in ranges of 8 MiB."""
    return io.BufferedReader(_RemoteFile(url), _READ_AHEAD)


def listing(pattern: str) -> list[str]:
    """The URLs that match a pattern with `*` or `?`, or lie in a directory that ends with `/`.

    Raises:
      UserError: the protocol has no listings.
    """
    scheme = urlsplit(pattern).scheme
    if scheme in ("http", "https"):
        raise UserError(
            f"source {pattern}: {scheme} has no listings; name the files, as in {{00000..00099}}.tar"
        )
    search = f"{pattern}*" if pattern.endswith("/") else pattern
    found = _patiently(pattern, lambda: _filesystem(pattern).glob(search, detail=True))
    return sorted(f"{scheme}://{name}" for name, info in found.items() if info.get("type") == "file")


class _RemoteFile(io.RawIOBase):
    """A remote file whose every read is a range request."""

    def __init__(self, url: str) -> None:
        self._url, self._place = url, 0
        self._size, _ = stat(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._place))
        if size:
            buffer[:size] = read_range(self._url, self._place, size)
            self._place += size
        return size


def _patiently(url: str, work: Callable[[], T], *, absent: bool = False) -> T | Any:
    """`work()`, tried again after failures that may pass; None where `absent` and there is no such file."""
    attempts = ATTEMPTS.get(urlsplit(url).scheme.lower(), 1)
    for attempt in range(attempts):
        try:
            return work()
        except UserError:
            raise
        except ImportError:
            raise UserError(
                f"{url}: reading it takes more packages: pip install 'lit-fast[remote]'"
            ) from None
        except Exception as raised:  # the packages under fsspec raise many kinds
            error = _true_error(raised)
            if isinstance(error, FileNotFoundError) and absent:
                return None
            if reason := _final(url, error):
                raise UserError(f"{url} {reason}") from None
            last = error
        if attempt < attempts - 1:
            # Not all threads at once.
            time.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1.5))
    raise UserError(f"{url} cannot be read, tried again and again: {_one_line(last)}")


def _true_error(error: BaseException) -> BaseException:
    """fsspec says of every failure to ask for a size over HTTP that there is no such file."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    passing = getattr(cause, "status", 404) not in (404, 410) or isinstance(cause, OSError | TimeoutError)
    return cause if passing else error


def _final(url: str, error: BaseException) -> str:
    """Why it is no use to try again; "" if it may be."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None and len(causes) < 5:
        causes.append(causes[-1].__cause__)
    names = {type(cause).__name__ for cause in causes}
    if "ClientPayloadError" in names:  # aiohttp's word for a cut connection; its cause claims the status 400
        return ""
    denied = isinstance(error, PermissionError) or names & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "DefaultCredentialsError",
        "RefreshError",
        "TokenRetrievalError",
    }
    status = next(
        (s for c in causes if isinstance(s := getattr(c, "status", getattr(c, "code", None)), int)), 0
    )
    if denied or status in (401, 403):
        public = {"s3": "FSSPEC_S3_ANON=true", "gs": "FSSPEC_GS_TOKEN=anon"}.get(urlsplit(url).scheme)
        hint = f"; for a public bucket set {public}" if public else ""
        return f"may not be read ({status or _one_line(error)}): check the credentials{hint}"
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "does not exist"
    if 400 <= status < 500 and status not in (408, 425, 429):
        return f"cannot be read: its server answers {status}"
    if isinstance(error, (ValueError, TypeError)) and not status:
        return f"cannot be read: {_one_line(error)}"
    return ""


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__


def _filesystem(url: str) -> Any:
    scheme = urlsplit(url).scheme.lower()
    if scheme not in SCHEMES:
        raise UserError(f"{url}: only local paths, {', '.join(f'{s}://' for s in SCHEMES)} are read")
    return _opened(scheme)


@cache
def _opened(scheme: str) -> Any:
    import fsspec

    for package in ("gcsfs", "s3fs", "aiobotocore", "botocore"):
        # They print tracebacks of failures that are handled here.
        logging.getLogger(package).setLevel(logging.CRITICAL + 1)
    if scheme in ("http", "https"):
        import aiohttp

        # No limit on the whole of a request, only on silence; and no compression, which has no ranges.
        silence = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        options = {"timeout": silence, "headers": {"Accept-Encoding": "identity"}}
        return fsspec.filesystem(scheme, client_kwargs=options, use_listings_cache=False)
    return fsspec.filesystem(scheme, use_listings_cache=False)


_with_ranges: set[tuple[str, str]] = set()  # scheme and address of servers


def _check_ranges(url: str) -> None:
    """Refuse a server that would send the whole file for every image; asked once per server."""
    server = urlsplit(url)[:2]
    if server in _with_ranges:
        return
    from fsspec.asyn import sync

    files = _filesystem(url)

    async def answer() -> int:
        session = await files.set_session()
        async with session.get(url, headers={"Range": "bytes=0-0"}) as response:
            response.raise_for_status()
            return response.status

    if _patiently(url, lambda: sync(files.loop, answer)) == 200:
        raise UserError(f"{url}: its server does not answer range requests; download it first")
    _with_ranges.add(server)
