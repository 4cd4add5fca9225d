"""Objects in buckets at gs:// and s3://, through TensorStore's key-value stores.

An object is written whole or not at all, and its generation changes with every write. A write may require a generation
(`expect`), by which two writers notice each other. A directory is the common beginning of names and needs no object.

Google's credentials are the application default ones. Amazon's are those of the environment or of ~/.aws;
AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL name another server, FSSPEC_S3_ANON=true reads public buckets.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import tensorstore as ts

from lit_fast.errors import UserError, first_line

ABSENT = b"\x02"  # the generation of an object that does not exist
THREADS = 32  # requests at a time

# The first contact with a bucket fails within seconds, later failures are retried for about two minutes.
_FIRST = {"max_retries": 4, "initial_delay": "200ms", "max_delay": "1s"}
_FIRST_SECONDS = 8.0  # also where something answers nothing at all
_LATER = {"max_retries": 16, "initial_delay": "250ms", "max_delay": "8s"}

# A connection without any traffic is given up and retried; without these TensorStore would wait for ever.
for _name, _seconds in (("LOW_SPEED_TIME", "30"), ("CONNECT_TIMEOUT", "10")):
    os.environ.setdefault(f"TENSORSTORE_CURL_{_name}_SECONDS", _seconds)
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

# They lead the default chain to credentials that are neither keys in the environment nor the machine's role.
_AWS_VARIABLES = (
    "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip

_PROBLEMS = (  # pattern in TensorStore's message, which has that of the server at its end; problem; action
    (
        r"PERMISSION_DENIED|UNAUTHENTICATED|\b40[13]\b|AccessDenied|Forbidden",
        "may not be used",
        "check the credentials",
    ),
    (r"credentials|authenticat|authoriz", "may not be used", "check the credentials"),
    (r"CURL error", "cannot be reached", "check the network"),
    (r"NoSuchBucket|bucket does not exist", "does not exist", "check the name of the bucket"),
    (r"invalid \w+ bucket name", "has an invalid name", "check the name of the bucket"),
    (
        r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|\b(429|5\d\d)\b",
        "does not answer after several attempts",
        "rerun the same command later",
    ),
)


class Object(NamedTuple):
    """The content of an object and its generation."""

    data: bytes | None  # None: there is none, or it is still of the generation that the caller has
    generation: bytes


def spec(url: str) -> dict[str, Any]:
    """Return the `kvstore` of TensorStore for the objects below a URL.

    Raises:
      UserError: the URL names no bucket.
    """
    parts = urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    path = parts.path.replace("%3F", "?").replace("%23", "#").strip("/")
    if not parts.netloc:
        raise UserError(f"{url} names no bucket; give {parts.scheme}://BUCKET/NAME")
    place = {"bucket": parts.netloc, "path": f"{path}/" if path else ""}
    if parts.scheme == "gs":
        return {"driver": "gcs", **place}
    found: dict[str, Any] = {"driver": "s3", **place}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if (
        endpoint
    ):  # by default TensorStore sends a HEAD request before each write to servers other than Amazon's
        found |= {"endpoint": endpoint.rstrip("/"), "use_conditional_write": True}
    if region or endpoint:
        found["aws_region"] = region or "auto"
    if os.environ.get("FSSPEC_S3_ANON", "").lower() == "true":
        found["aws_credentials"] = {"type": "anonymous"}
    elif os.environ.get("AWS_ACCESS_KEY_ID"):  # the default chain prints errors where there is no ~/.aws
        found["aws_credentials"] = {"type": "environment"}
    elif not any(name in os.environ for name in _AWS_VARIABLES) and not os.path.isdir(
        os.path.expanduser("~/.aws")
    ):
        if not _has_instance_role():
            raise UserError(
                f"{url} may not be used: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or FSSPEC_S3_ANON=true for a public bucket"
            )
        found["aws_credentials"] = {"type": "imds"}
    return found


@cache
def _has_instance_role() -> bool:
    """Return whether this is a machine at Amazon, whose metadata server may give credentials.

    TensorStore prints errors of its own where nothing answers there.
    """
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    server = urlsplit(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254")
    try:
        socket.create_connection((server.hostname or "", server.port or 80), timeout=1.0).close()
    except OSError:
        return False
    return True


@cache
def context(first: bool = False) -> ts.Context:
    """Return the limits of requests; with `first` those of the first contact."""
    retries, limit = _FIRST if first else _LATER, {"limit": THREADS}
    return ts.Context(
        {f"{driver}_request_concurrency": limit for driver in ("gcs", "s3")}
        | {f"{driver}_request_retries": retries for driver in ("gcs", "s3")}
        # Without locks of the file system, which some have not, a file is written beside its place and renamed; one
        # process writes a shard at a time.
        | {"file_io_concurrency": {"limit": 16}, "file_io_locking": {"mode": "none"}}
        | {"cache_pool": {"total_bytes_limit": 0}}
    )


def read(url: str, unless: bytes | None = None) -> Object:
    """Read an object whole.

    Args:
      unless: a generation; the data of an object that still has it is not sent.

    Raises:
      UserError: the bucket cannot be read.
    """
    store, key = _locate(url)
    found = _wait(url, store.read, key, if_not_equal=unless)
    if found.state == "value":
        return Object(found.value, found.stamp.generation)
    return Object(None, ABSENT if found.state == "missing" else unless or ABSENT)


def generation(url: str) -> bytes:
    """Return the generation of an object, `ABSENT` where there is none; its data is not sent."""
    store, key = _locate(url)
    if not key:
        return ABSENT
    found = _wait(url, store.read, key, byte_range=slice(0, 0))
    return found.stamp.generation if found.state == "value" else ABSENT


def read_range(url: str, start: int, stop: int | None) -> bytes:
    """Read the bytes from `start` to `stop` of an object; a negative `start` counts from its end.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it ends earlier.
      UserError: the bucket cannot be read.
    """
    store, key = _locate(url)
    try:
        found = _wait(url, store.read, key, byte_range=slice(start, stop))
    except UserError as error:
        if "OUT_OF_RANGE" in str(error.__cause__):
            raise ValueError(f"{url} ends early") from None
        raise
    if found.state != "value":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return found.value


def write(url: str, data: bytes, expect: bytes | None = None) -> bytes:
    """Write an object and return its generation; b"" if `expect` was given and is not its present generation.

    Raises:
      UserError: the bucket cannot be written.
    """
    store, key = _locate(url)
    return _wait(url, store.write, key, data, if_equal=expect).generation


def delete(url: str, expect: bytes | None = None) -> bool:
    """Delete an object, if it exists; return False if it does not have the generation `expect`."""
    store, key = _locate(url)
    return bool(_wait(url, store.write, key, None, if_equal=expect).generation)


def names_below(url: str) -> list[str]:
    """Return the names of all objects below a URL, relative to it, sorted."""
    store = _open(url.rstrip("/"))
    return sorted(_text(url, key) for key in _wait(url, store.list))


def delete_below(url: str) -> None:
    """Delete all objects below a URL."""
    base = url.rstrip("/")
    with ThreadPoolExecutor(THREADS, "bucket") as pool:
        list(pool.map(delete, [f"{base}/{name}" for name in names_below(base)]))


def _text(url: str, key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise UserError(f"{url} holds the name {key!a}, which is not UTF-8; rename it") from None


_stores: dict[str, ts.KvStore] = {}
_stores_lock = threading.Lock()


def _locate(url: str) -> tuple[ts.KvStore, str]:
    """Return the store of a bucket and the key of an object in it."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return _open(f"{scheme}://{bucket}"), key


def _open(url: str) -> ts.KvStore:
    """Return the store of the objects below a URL; the first contact with a bucket is one quick request."""
    with _stores_lock:
        if url not in _stores:
            scheme, _, rest = url.partition("://")
            root = f"{scheme}://{rest.partition('/')[0]}"
            if root not in _stores:
                _check_access(root)
                _stores[root] = _wait(root, ts.KvStore.open, spec(root), context=context())
            _stores[url] = _wait(url, ts.KvStore.open, spec(url), context=context())
        return _stores[url]


def _check_access(root: str) -> None:
    """Read an object that need not exist; raises UserError within seconds where the bucket cannot be used."""
    deadline = time.monotonic() + _FIRST_SECONDS
    store = _wait(root, ts.KvStore.open, spec(root), context=context(first=True))
    read = store.read(
        ".lit_fast", byte_range=slice(0, 0)
    )  # a future whose result is not awaited is cancelled
    while not read.done():
        if time.monotonic() > deadline:
            raise UserError(
                f"{root} does not answer within {_FIRST_SECONDS:.0f} s; check the network and the credentials"
            )
        time.sleep(0.002)
    _wait(root, lambda: read)


def _wait(url: str, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the result of the future that `work` returns."""
    try:
        return work(*args, **options).result()
    except (ValueError, OSError, RuntimeError, NotImplementedError, KeyError) as error:
        _refuse(url, error)


def _refuse(url: str, error: Exception) -> NoReturn:
    text = str(error)
    found = (p for p in _PROBLEMS if re.search(p[0], text, re.IGNORECASE))
    _, problem, action = next(found, ("", "cannot be used", "fix the cause, then rerun the same command"))
    raise UserError(f"{url} {problem} ({first_line(error)[:200]}); {action}") from error
