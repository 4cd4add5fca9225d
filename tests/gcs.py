"""The part of Google Cloud Storage's JSON API that TensorStore and gcsfs read with, on localhost, in memory."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CUT = -1


class FakeGcs(ThreadingHTTPServer):
    """A server of buckets; every bucket but those in `absent_buckets` exists.

    Attributes:
      objects: BUCKET/NAME -> content and generation.
      latency: seconds before each answer.
      statuses: statuses of the next requests; 0: the right answer.
      fault: returns the status of a request by its method and path; 0: the right answer; CUT: none, the connection
        ends in the middle of a request or of an answer.
      requests: method, path and range of all requests so far.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.absent_buckets: set[str] = set()
        self.statuses: list[int] = []
        self.fault: Callable[[str, str], int] = lambda method, path: 0
        self.requests: list[tuple[str, str, str]] = []
        self.lock, self.generation, self.latency = threading.Lock(), 0, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which TensorStore and gcsfs use this server."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "STORAGE_EMULATOR_HOST": self.url,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that were killed."""


@contextmanager
def running_gcs() -> Iterator[FakeGcs]:
    server = FakeGcs()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeGcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _cut = False

    def do_GET(self) -> None:
        server, parts = self.server, urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # the client was killed: there is no object
            self.close_connection = True
            return
        server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        time.sleep(server.latency)
        status = server.statuses.pop(0) if server.statuses else server.fault(self.command, self.path)
        if status == CUT and self.command == "GET":
            self._cut = True
        elif status:
            if status == CUT:
                self.close_connection = True
            else:
                self._send(status, b"{}")
            return
        match = re.fullmatch(r"/((?:upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?", parts.path)
        if not match or match[2] in server.absent_buckets:
            self._send(404, b'{"error": {"message": "The specified bucket does not exist."}}')
            return
        bucket, name = match[2], unquote(match[3]) if match[3] else query.get("name")
        if "/o" not in parts.path:
            self._send(200, json.dumps({"kind": "storage#bucket", "name": bucket}).encode())
        elif self.command == "GET" and name is None:
            self._list(bucket, query)
        else:
            self._object(bucket, str(name), body, query, media=bool(match[1]) or query.get("alt") == "media")

    do_POST = do_DELETE = do_GET

    def _object(self, bucket: str, name: str, body: bytes, query: dict[str, str], media: bool) -> None:
        server, key = self.server, f"{bucket}/{name}"
        with server.lock:
            data, generation = server.objects.get(key, (b"", 0))
            expected = int(query.get("ifGenerationMatch", generation))
            if expected != generation and (generation or self.command != "GET"):
                self._send(412, b"{}")
                return
            if self.command == "POST":
                server.generation += 1
                server.objects[key] = body, server.generation
                self._send(200, json.dumps(_resource(bucket, name, body, server.generation)).encode())
                return
            if not generation:
                self._send(404, b"{}")
                return
            if self.command == "DELETE":
                del server.objects[key]
                self._send(204, b"")
                return
        if query.get("ifGenerationNotMatch") == str(generation):
            self._send(304, b"")
        elif not media:
            self._send(200, json.dumps(_resource(bucket, name, data, generation)).encode())
        else:
            self._media(data, generation)

    def _media(self, data: bytes, generation: int) -> None:
        headers = {"x-goog-generation": str(generation)}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match:
            self._send(200, data, headers)
            return
        first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
        last = min(int(match[2]), len(data) - 1) if match[1] and match[2] else len(data) - 1
        if first > last:
            self._send(416, b"", headers)
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        with self.server.lock:
            objects = {
                k.partition("/")[2]: v for k, v in self.server.objects.items() if k.startswith(f"{bucket}/")
            }
        start, end, prefix = query.get("startOffset", ""), query.get("endOffset"), query.get("prefix", "")
        after, delimiter = query.get("pageToken", ""), query.get("delimiter", "")
        names = [
            n for n in sorted(objects) if n.startswith(prefix) and start <= n and (end is None or n < end)
        ]
        prefixes = set()
        if delimiter:
            rest = {n: n[len(prefix) :] for n in names}
            prefixes = {prefix + r.split(delimiter)[0] + delimiter for r in rest.values() if delimiter in r}
            names = [n for n, r in rest.items() if delimiter not in r]
        names = [n for n in names if n > after]
        page = names[: int(query.get("maxResults", 1000))]
        answer: dict[str, Any] = {"items": [_resource(bucket, n, *objects[n]) for n in page]}
        if prefixes:
            answer["prefixes"] = sorted(prefixes)
        if len(page) < len(names):
            answer["nextPageToken"] = page[-1]
        self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self._cut:
            body, self._cut, self.close_connection = body[: len(body) // 2], False, True
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


def _resource(bucket: str, name: str, data: bytes, generation: int) -> dict[str, str]:
    stamp = "2026-01-01T00:00:00Z"
    return {
        "kind": "storage#object", "bucket": bucket, "name": name, "generation": str(generation),
        "metageneration": "1", "size": str(len(data)), "updated": stamp, "timeCreated": stamp,
        "etag": f"etag{generation}",
    }  # fmt: skip
