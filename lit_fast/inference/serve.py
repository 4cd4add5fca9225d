"""Search as a local web page: a small HTTP server over `lit_fast.inference.searcher`.

GET  /?q=TEXT[&top=N]              the page with the nearest images of a text
POST /                             the same of an image: a multipart form with the field `image`
GET  /search.json?q=TEXT[&top=N]   the rows as JSON, as of `lit-fast search --json`
GET  /image/ROW                    an image of the dataset, decoded and encoded again

Requests are not trusted. The size of everything read is limited, images are decoded with the limits of
`lit_fast.data.images.decode`, and no path of a request is a path of a file. On a loopback address, requests for another
host name are refused, since a web page elsewhere could otherwise read the dataset through the browser (DNS rebinding).
"""

from __future__ import annotations

import io
import ipaddress
import json
import secrets
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from email import message_from_bytes
from email.errors import MessageError
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lit_fast.data.images.decode import ImageError, decode
from lit_fast.data.images.reader import ImageReader
from lit_fast.errors import UserError, first_line, os_reason
from lit_fast.inference.search_page import as_json, section
from lit_fast.inference.searcher import Answer, Searcher
from lit_fast.report.page import render
from lit_fast.utils.output import status

TOP = 20  # rows per query, unless the request says another number
MAX_TOP = 100
MAX_QUERY = 1000  # characters
MAX_UPLOAD = 32 << 20  # bytes
SECONDS = 30  # that a client may take for its request
_SIDE = 1600  # pixels of the longer side of a sent image
_UPLOAD = "the image"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class RequestError(Exception):
    """A request that is refused."""

    def __init__(self, code: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.code = code


class SearchServer(ThreadingHTTPServer):
    """Serves one dataset and one model; `serve_forever` answers requests, one search at a time."""

    daemon_threads = False

    def __init__(self, host: str, port: int, searcher: Searcher) -> None:
        """Bind the address.

        Args:
          host: an IP address or a name of this machine.
          port: 0: any free one.
          searcher: model and dataset.

        Raises:
          UserError: the address cannot be used.
        """
        self.searcher, self.reader, self.lock = searcher, ImageReader(searcher.dataset), threading.Lock()
        self._connections: set[socket.socket] = set()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else "no such port"
            raise UserError(f"--host {host} --port {port} cannot be used: {reason}; choose another") from None
        self.host = f"[{host}]" if ":" in host else host
        self.is_local = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        """Return the address of the page."""
        return f"http://{self.host}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect; called in the `except` clause of a request."""

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a request in a thread."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Close the server after the requests that it has received; other requests are not read."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        super().server_close()  # waits for the threads: one in JAX would abort the process at its end

    def answer(self, texts: Sequence[str], images: dict[str, bytes], top: int) -> list[Answer]:
        """Answer the queries of one request.

        Raises:
          RequestError: the image is none.
        """
        try:
            pictures = {name: decode(data) for name, data in images.items()}
        except ImageError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"{_UPLOAD} cannot be used: {error}") from None
        with self.lock:
            return self.searcher.answer(texts, pictures, top)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: SearchServer
    server_version, sys_version = "lit_fast", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        """Send the page, the rows as JSON, or an image."""
        self._answer(self._get)

    def do_HEAD(self) -> None:
        """Send the headers of `do_GET`."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Send the page of an uploaded image."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a query belongs to the person who asks."""

    def _answer(self, handle: Any) -> None:
        try:
            self._check_host()
            handle()
        except RequestError as error:
            self._send_page(error.code, str(error))
        except ConnectionError:
            raise
        except UserError as error:
            status(f"request failed: {error}")
            self._send_page(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        except Exception as error:
            status(f"request failed: {first_line(error)}")
            self._send_page(HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; see the terminal")

    def _check_host(self) -> None:
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.server.is_local and name not in (*_LOOPBACK, self.server.host):
            raise RequestError(HTTPStatus.FORBIDDEN, "this address serves localhost only")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RequestError(HTTPStatus.FORBIDDEN, "requests of other pages are refused")

    def _get(self) -> None:
        url = urlsplit(self.path)
        try:
            fields = parse_qs(url.query, keep_blank_values=True, max_num_fields=20, errors="replace")
        except ValueError:
            raise RequestError(HTTPStatus.BAD_REQUEST, "the query has too many fields") from None
        query = " ".join(fields.get("q", [""])[0].split())
        if len(query) > MAX_QUERY:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"the query has more than {MAX_QUERY} characters")
        if url.path == "/":
            answers = self.server.answer([query], {}, _top(fields)) if query else []
            self._send_page(HTTPStatus.OK, "", answers)
        elif url.path == "/search.json":
            if not query:
                raise RequestError(HTTPStatus.BAD_REQUEST, "the query is missing; give /search.json?q=TEXT")
            answers = self.server.answer([query], {}, _top(fields))
            self._send(HTTPStatus.OK, "application/json", json.dumps(as_json(answers)).encode())
        elif url.path.startswith("/image/"):
            self._send(HTTPStatus.OK, "image/jpeg", self._image(url.path.removeprefix("/image/")))
        elif url.path == "/favicon.ico":  # browsers ask for it
            self._send(HTTPStatus.NO_CONTENT, "image/x-icon", b"")
        else:
            raise RequestError(HTTPStatus.NOT_FOUND, "no such page; the search is at /")

    def _post(self) -> None:
        if urlsplit(self.path).path != "/":
            raise RequestError(HTTPStatus.NOT_FOUND, "no such page; images are sent to /")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "the size of the upload is missing")
        if len(length) > 12 or int(length) > MAX_UPLOAD:
            limit = f"{MAX_UPLOAD >> 20} MiB"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{_UPLOAD} is larger than {limit}")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the upload is incomplete")
        images = {_UPLOAD: form_file(self.headers.get("Content-Type", ""), data, "image")}
        self._send_page(HTTPStatus.OK, "", self.server.answer([], images, TOP), images)

    def _image(self, row: str) -> bytes:
        """Return an image of the dataset as a JPEG."""
        if not (
            row.isascii() and row.isdigit() and len(row) < 13 and int(row) < self.server.searcher.dataset.rows
        ):
            raise RequestError(HTTPStatus.NOT_FOUND, "the dataset has no such row")
        data = self.server.reader.read_or_none(int(row))
        try:
            image = decode(data or b"", at_least=_SIDE, alpha="white")
        except ImageError as error:
            raise RequestError(
                HTTPStatus.NOT_FOUND, f"the image of row {row} cannot be shown: {error}"
            ) from None
        image.info.clear()
        image.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        return file.getvalue()

    def _send_page(
        self,
        code: HTTPStatus,
        message: str,
        answers: Sequence[Answer] = (),
        images: dict[str, bytes] | None = None,
    ) -> None:
        searcher = self.server.searcher
        model, dataset = searcher.model, searcher.dataset
        query = next((answer.query for answer in answers if answer.kind == "text"), "")
        sections = [
            section(answer, self.server.reader.read_or_none, (images or {}).__getitem__, "/image/")
            for answer in answers
        ]
        nonce = secrets.token_urlsafe(16)
        page = render(
            "serve.html",
            title=f"Search in {dataset.name}",
            note=f"{dataset.rows:,} images, found by {model.name}, step {model.step}.",
            query=query,
            message=message,
            sections=sections,
            max_query=MAX_QUERY,
            nonce=nonce,
        )
        self._send(code, "text/html; charset=utf-8", page.encode("utf-8", "replace"), nonce)

    def _send(self, code: HTTPStatus, kind: str, data: bytes, nonce: str = "") -> None:
        script = f"script-src 'nonce-{nonce}'; " if nonce else ""
        policy = (
            f"default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; {script}"
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def form_file(content_type: str, data: bytes, name: str) -> bytes:
    """Return a file of a multipart form.

    Raises:
      RequestError: the form has no such file.
    """
    header = f"Content-Type: {' '.join(content_type.split())}\r\n\r\n".encode("latin-1", "replace")
    try:
        message = message_from_bytes(header + data)
        for part in message.get_payload() if message.is_multipart() else ():
            if part.get_param("name", header="Content-Disposition") == name:  # type: ignore[union-attr]
                content = part.get_payload(decode=True)  # type: ignore[union-attr]
                if isinstance(content, bytes) and content:
                    return content
    except (MessageError, RecursionError, ValueError, LookupError, AttributeError):
        pass
    raise RequestError(HTTPStatus.BAD_REQUEST, f"the form has no file {name!r}; choose an image")


def _top(fields: dict[str, list[str]]) -> int:
    text = fields.get("top", [str(TOP)])[0]
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MAX_TOP):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"top must be a number from 1 to {MAX_TOP}")
    return int(text)
