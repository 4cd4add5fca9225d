"""Large files from the web: resumed where they were cut, checked, whole or absent.

Beside `FILE` stands `FILE.json` with its source, size and SHA-256; until it is whole it is `FILE.part`.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lit_fast.errors import UserError
from lit_fast.storage.files import read_json, write_json
from lit_fast.utils.progress import Progress

MAX_BYTES = 100_000_000_000
_CHUNK = 1 << 20
_TRIES = 4  # without a byte of progress
_WAIT = 1.0  # seconds before the second try
_TIMEOUT = 30.0  # seconds without an answer or a byte
_PASSING = (408, 429, 500, 502, 503, 504)
_FAILURES = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)


class HttpError(Exception):
    """The server answered with an error status that will not pass."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Unreachable(Exception):
    """The server could not be reached, or failed again and again; the message is the reason."""


class Downloaded(NamedTuple):
    """What is known of a finished download."""

    sha256: str
    headers: dict[str, str]  # of all answers on the way, lower-case names; the first one to say it wins


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Downloaded:
    """Fetch `url` into `path`, going on with a `.part` of an earlier attempt.

    The content is checked against `sha256`, else against the SHA-256 that the Hugging Face Hub sends as
    `X-Linked-ETag`, else against the MD5 that Google Cloud Storage sends as `x-goog-hash`. `headers` go
    to the host of `url` only. Connection failures and passing errors are tried again three times, after
    1, 2 and 4 seconds; whenever bytes have come the count begins anew. Several processes may do this at
    once: one downloads, the others wait for it.

    Raises:
      HttpError: the server refuses.
      Unreachable: it cannot be reached.
      UserError: the file is too large or not the expected one, or the address is not safe.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} is not an http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_whole(path) and (known := recorded_sha256(path)):  # by another process, meanwhile
            return Downloaded(known, _record(path).get("headers", {}))
        tries = 0
        while True:
            before = _size(_part(path))
            try:
                got = _attempt(url, path, headers or {}, max_bytes)
                break
            except _FAILURES as error:  # not every OSError: a full disk does not pass
                if isinstance(error, urllib.error.HTTPError) and error.code not in _PASSING:
                    raise HttpError(error.code) from None
                tries = 0 if _size(_part(path)) > before else tries + 1
                if tries >= _TRIES:
                    raise Unreachable(_reason(error)) from None
                time.sleep(_WAIT * 2 ** max(tries - 1, 0))
        return _finish(url, path, sha256, got)


def recorded_sha256(path: Path) -> str | None:
    """SHA-256 that a downloaded file had when it came, None for a file of other origin."""
    value = _record(path).get("sha256")
    return value if isinstance(value, str) else None


def is_whole(path: Path) -> bool:
    """Whether the file is there and as long as it was when it came; one put there by hand counts."""
    return path.is_file() and _record(path).get("bytes", _size(path)) == _size(path)


def _attempt(url: str, path: Path, headers: Mapping[str, str], limit: int) -> dict[str, str]:
    """Write the rest of the file into its `.part`; the headers of all answers."""
    part, told = _part(path), path.with_name(f"{path.name}.part.json")
    etag = str(_object(told).get("etag") or "")
    done = _size(part) if etag else 0  # without an ETag nobody knows whether the file is still the same
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "lit-fast"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    if done:
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", etag)
    seen: dict[str, str] = {}
    try:
        answer = urllib.request.build_opener(_Redirects(headers, seen)).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":  # it was whole, only not yet renamed
            _collect(seen, error.headers)
            return seen
        part.unlink()
        raise ConnectionError("the partial file did not fit") from None
    with answer:
        _collect(seen, answer.headers)
        validator = str(answer.headers.get("ETag") or "")
        if answer.status != 206:
            done = 0
        elif not str(answer.headers.get("Content-Range")).startswith(f"bytes {done}-") or validator != etag:
            part.unlink()
            raise ConnectionError("the server sent another part than was asked for")
        length = answer.headers.get("Content-Length") or ""
        total = done + int(length) if length.isdecimal() else None
        if total is not None and total > limit:
            raise UserError(f"{url} has {total:,} bytes, more than the limit of {limit:,}")
        with open(part, "r+b" if done else "wb") as file:
            file.seek(done)
            # Only now, so that the ETag never stands beside bytes of another one. Weak ones promise nothing.
            write_json(told, {"url": url, "etag": validator if validator.startswith('"') else None})
            _copy(answer, file, f"downloading {path.name}", done, total, limit)
        if total is not None and _size(part) != total:
            raise ConnectionError(f"the connection was cut after {_size(part):,} of {total:,} bytes")
    return seen


def _copy(
    answer: http.client.HTTPResponse, file: Any, what: str, done: int, total: int | None, limit: int
) -> None:
    mega = 1_000_000
    progress = Progress(what, (total or 0) // mega, "MB", start=done // mega)
    try:
        while chunk := answer.read1(_CHUNK):  # as it comes, so that a kill loses little
            progress.advance((done + len(chunk)) // mega - done // mega)
            done += len(chunk)
            if done > limit:
                raise UserError(f"{what}: more than the limit of {limit:,} bytes")
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    finally:
        if (total or 0) >= mega:
            progress.close()


def _finish(url: str, path: Path, sha256: str | None, seen: dict[str, str]) -> Downloaded:
    """Check the `.part` and give it its name."""
    part = _part(path)
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    linked = seen.get("x-linked-etag", "").strip('"').lower()
    wanted, have = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None), found
    md5 = re.search(r"md5=([\w+/]{22}==)", seen.get("x-goog-hash", ""))
    if wanted is None and md5:
        with open(part, "rb") as file:
            have = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        wanted = base64.b64decode(md5[1]).hex()
    told = path.with_name(f"{path.name}.part.json")
    if wanted is not None and have != wanted.lower():
        part.unlink()
        told.unlink()
        raise UserError(f"{url} came with the digest {have}, not {wanted}; it was removed, try again")
    kept = {k: v for k, v in seen.items() if k in ("x-repo-commit", "etag")}
    write_json(_record_path(path), {"url": url, "bytes": _size(part), "sha256": found, "headers": kept})
    os.replace(part, path)
    told.unlink()
    return Downloaded(found, seen)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; secret headers stay with the first host, and nothing leaves https."""

    def __init__(self, secret: Mapping[str, str], seen: dict[str, str]) -> None:
        self._secret, self._seen = secret, seen

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _collect(self._seen, headers)
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise UserError(f"{req.full_url} redirects to {newurl}, which is not safe")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            for name in self._secret:
                if req.has_header(name.capitalize()):  # a host that it left does not get it back
                    request.add_unredirected_header(name, self._secret[name])
        return request


def _collect(seen: dict[str, str], headers: Message) -> None:
    for name in {n.lower() for n in headers}:
        seen.setdefault(name, ", ".join(headers.get_all(name, [])))


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(reason).__name__


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _record(path: Path) -> dict[str, Any]:
    return _object(_record_path(path))


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
