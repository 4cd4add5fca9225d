"""Serve a directory as gs://bucket on localhost, with a latency: the reading part of Google's JSON interface.

    python -m benchmarks.bucket_server DIRECTORY [--latency 0.04] [--certificate FILE.pem]

Prints its address. Each request waits before its answer; bodies are sent with sendfile, over HTTPS in pieces.
"""

from __future__ import annotations

import argparse
import json
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@contextmanager
def running_server(directory: Path, latency: float, certificate: Path | None) -> Iterator[dict[str, str]]:
    """Run the server in a process of its own; yield the environment variables with which TensorStore uses it."""
    command = [sys.executable, "-m", "benchmarks.bucket_server", str(directory), "--latency", str(latency)]
    if certificate:
        command += ["--certificate", str(certificate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError("the server did not start")
            trusted = {"TENSORSTORE_CA_BUNDLE": str(certificate)} if certificate else {}
            yield {
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            } | trusted
        finally:
            process.kill()


def make_certificate(file: Path) -> Path:
    """Write a self-signed certificate of localhost and its key into one file."""
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", file, "-out", file.with_suffix(".crt"),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    return file


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory: Path, latency: float, certificate: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.latency = latency
        self.files = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
        if certificate:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            # The handshake is in the thread of the connection.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have ended."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        time.sleep(self.server.latency)
        match = re.fullmatch(r"/(?:download/)?storage/v1/b/bucket/o(?:/([^/]+))?", parts.path)
        if match and match[1] is None:
            self._list(query)
        elif not match or unquote(match[1]) not in self.server.files:
            self._send(404, b"{}")
        elif query.get("alt") == "media" or parts.path.startswith("/download/"):
            self._media(self.server.files[unquote(match[1])])
        else:
            name = unquote(match[1])
            self._send(200, json.dumps(_resource(name, self.server.files[name])).encode())

    def _media(self, file: Path) -> None:
        size = file.stat().st_size
        first, last, status = 0, size - 1, 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            status = 206
            first = int(match[1]) if match[1] else max(0, size - int(match[2]))
            last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
        self.send_response(status)
        self.send_header("x-goog-generation", "1")
        self.send_header("Content-Length", str(last - first + 1))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        self.wfile.flush()
        with open(file, "rb") as source:
            self.connection.sendfile(source, first, last - first + 1)

    def _list(self, query: dict[str, str]) -> None:
        start, end, prefix = query.get("startOffset", ""), query.get("endOffset"), query.get("prefix", "")
        names = [n for n in sorted(self.server.files) if n.startswith(prefix) and n >= start]
        names = [n for n in names if (end is None or n < end) and n > query.get("pageToken", "")]
        page = names[:1000]
        answer: dict[str, Any] = {"items": [_resource(name, self.server.files[name]) for name in page]}
        if len(page) < len(names):
            answer["nextPageToken"] = page[-1]
        self._send(200, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


def _resource(name: str, file: Path) -> dict[str, str]:
    stamp = "2026-01-01T00:00:00Z"
    return {
        "kind": "storage#object", "bucket": "bucket", "name": name, "generation": "1", "metageneration": "1",
        "size": str(file.stat().st_size), "updated": stamp, "timeCreated": stamp, "etag": "etag",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--certificate", help="serve https with this certificate and key")
    args = parser.parse_args()
    server = _Server(args.directory, args.latency, args.certificate)
    scheme = "https" if args.certificate else "http"
    print(f"{scheme}://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
