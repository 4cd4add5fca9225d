"""Real servers on localhost for tests of remote sources."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class FileServer(ThreadingHTTPServer):
    """Serves the files of a directory over HTTP and counts what it is asked."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.ranges = True  # answer range requests
        self.statuses: list[int] = []  # answers to the next GET requests instead of files
        self.cuts = 0  # GET requests whose answers break off in the middle
        self.forbidden = False
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        if self.server.statuses:
            self._empty(self.server.statuses.pop(0))
        else:
            self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.server.requests[self.command] += 1
        path = self.server.root / unquote(self.path.partition("?")[0]).lstrip("/")
        if self.server.forbidden:
            self._empty(403)
            return
        if not path.is_file():
            self._empty(404)
            return
        data = path.read_bytes()
        etag = f'"{hash(data):x}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", etag)
        self.end_headers()
        if body and self.server.cuts:
            self.server.cuts -= 1
            self.close_connection = True
            data = data[: len(data) // 2]
        if body:
            self.wfile.write(data)

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not on stderr."""


@contextmanager
def file_server(root: Path) -> Iterator[FileServer]:
    """A running `FileServer`."""
    server = FileServer(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
