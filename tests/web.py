"""An HTTP server on this machine that misbehaves as asked, and an environment of its own for downloads."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_fast.storage import download

BODY = np.random.default_rng(0).bytes(300_000)


@dataclass
class Answer:
    """What the server has at a path, and how it misbehaves."""

    body: bytes = BODY
    etag: str | None = '"one"'
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    redirect: str = ""
    ranges: bool = True
    cut: list[int] = field(default_factory=list)  # bytes after which each of the next answers ends
    failures: list[int] = field(default_factory=list)  # status of each of the next answers
    pause: float = 0.0  # seconds between pieces of 10 000 bytes


class Server:
    """An HTTP server on localhost, and the requests that came."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                outer._answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def _answer(self, to: BaseHTTPRequestHandler) -> None:
        answer = self.answers.get(to.path, Answer(b"nothing", status=404))
        status, first = answer.failures.pop(0) if answer.failures else answer.status, 0
        wanted = to.headers.get("Range")
        if answer.redirect:
            status = 302
        elif wanted and answer.ranges and to.headers.get("If-Range") in (None, answer.etag):
            first, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            if first >= len(answer.body):
                status = 416
        body = b"" if status in (302, 416) else answer.body[first:]
        to.send_response(status)
        to.send_header("Content-Length", str(len(body)))
        if answer.redirect:
            to.send_header("Location", answer.redirect)
        if answer.etag:
            to.send_header("ETag", answer.etag)
        if status == 206:
            to.send_header("Content-Range", f"bytes {first}-{len(answer.body) - 1}/{len(answer.body)}")
        if status == 416:
            to.send_header("Content-Range", f"bytes */{len(answer.body)}")
        for name, value in answer.headers.items():
            to.send_header(name, value)
        to.end_headers()
        end = answer.cut.pop(0) if answer.cut and status in (200, 206) else len(body)
        for start in range(0, min(end, len(body)), 10_000):
            to.wfile.write(body[start : min(start + 10_000, end)])
            to.wfile.flush()
            time.sleep(answer.pause)
        if end < len(body):
            to.close_connection = True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(name="make_server")
def servers() -> Iterator[Callable[[], Server]]:
    made: list[Server] = []

    def make() -> Server:
        made.append(Server())
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture(name="server")
def one_server(make_server: Callable[[], Server]) -> Server:
    return make_server()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "LIT_FAST_OFFLINE", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_WAIT", 0.01)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()
