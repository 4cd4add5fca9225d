"""HTTP servers on this machine for tests: files that fail as asked, and a Hub of repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import numpy as np
import pytest

from lit_fast.storage import remote

_HUB_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "LIT_FAST_OFFLINE")

BODY = np.random.default_rng(0).bytes(300_000)
COMMIT = "a" * 40


@dataclass
class Answer:
    """The content of a path of the server, and how its answers fail."""

    body: bytes = BODY
    etag: str = '"one"'
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    redirect: str = ""
    ranges: bool = True  # answer range requests
    cut: list[int] = field(default_factory=list)  # bytes after which each of the next answers ends
    halved: bool = False  # the answer ends in the middle


class Server:
    """An HTTP server on localhost, and the requests that it got."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {k.lower(): v for k, v in self.headers.items()}
                body = self.rfile.read(int(headers.get("content-length", 0)))
                outer.requests.append((self.command, self.path, headers))
                outer.send(self, outer.answer(self.command, self.path, body))

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """Return the answer to a request."""
        return self.answers.get(unquote(path), Answer(b"nothing", status=404))

    def send(self, to: BaseHTTPRequestHandler, answer: Answer) -> None:
        """Write an answer, or the range of it that was requested."""
        status, body = answer.status, answer.body
        headers = {"ETag": answer.etag} | answer.headers
        first, _, last = to.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if answer.redirect:
            status, body, headers["Location"] = 302, b"", answer.redirect
        elif first and status == 200 and answer.ranges:
            end = min(int(last), len(body) - 1) if last else len(body) - 1
            headers["Content-Range"] = f"bytes {first}-{end}/{len(body)}"
            status, body = 206, body[int(first) : end + 1]
        to.send_response(status)
        headers = {"Content-Length": str(len(body)), "Connection": "close"} | headers
        for name, value in headers.items():
            to.send_header(name, value)
        to.end_headers()
        if to.command == "HEAD":
            return
        end = len(body) // 2 if answer.halved else len(body)
        end = answer.cut.pop(0) if answer.cut and status in (200, 206) else end
        to.wfile.write(body[:end])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class FileServer(Server):
    """A server of the files below a directory."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.ranges = True
        self.forbidden = False
        self.statuses: list[int] = []  # of the next GET requests
        self.cuts = 0  # the next GET requests whose answers end in the middle

    @property
    def downloads(self) -> int:
        """The number of GET requests."""
        return sum(method == "GET" for method, _, _ in self.requests)

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        file = self.root / unquote(path.partition("?")[0]).lstrip("/")
        if method == "GET" and self.statuses:
            return Answer(b"", status=self.statuses.pop(0))
        if self.forbidden or not file.is_file():
            return Answer(b"", status=403 if self.forbidden else 404)
        data = file.read_bytes()
        halved = method == "GET" and self.cuts > 0
        self.cuts -= halved
        return Answer(data, f'"{sha(data)}"', ranges=self.ranges, halved=halved)


class Hub(Server):
    """A Hub of repositories: what huggingface_hub asks for to download, list, read and upload files.

    Files of more than 1000 bytes are large: they are redirected to a content server, with their SHA-256 as the ETag,
    and uploaded to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.repositories: dict[str, dict[str, bytes]] = {}  # "owner/name" or "datasets/owner/name" -> files
        self.commits: dict[str, str] = {}  # of repositories that have another one than COMMIT
        self.history: dict[tuple[str, str], dict[str, bytes]] = {}  # repository, earlier commit -> files
        self.private: set[str] = set()  # repositories that are absent without a token
        self.gated: set[str] = set()  # repositories whose files need a token
        self.refused = 0  # status of all answers to requests that write; 0: they are accepted
        self.content = Content()  # of large files
        self.cut: list[int] = []  # bytes after which each of the next large files ends

    def add(self, repository: str, files: dict[str, bytes] | Path) -> None:
        """Add a repository with the given files, or those below a directory."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        self.repositories[repository] = files

    @property
    def downloads(self) -> list[str]:
        """The paths of the GET requests for files."""
        return [path for method, path, _ in self.requests if method == "GET" and "/api/" not in path]

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        path = path.partition("?")[0]
        api = path.startswith("/api/")
        authorized = any("authorization" in headers for _, p, headers in self.requests[-1:])
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), authorized)
        parts = path.removeprefix("/api").lstrip("/").removeprefix("models/" if api else "").split("/")
        length = 3 if parts[0] == "datasets" else 2
        repository, rest = "/".join(parts[:length]), [unquote(part) for part in parts[length:]]
        if repository.endswith(".git"):
            return Answer(b"", status=self.refused) if self.refused else self.content.batch(json.loads(body))
        files, commit = self.repositories.get(repository), self.commits.get(repository, COMMIT)
        if files is None or (repository in self.private and not authorized):
            return _error("RepoNotFound", 401)
        revision = rest[1] if len(rest) > 1 else "main"
        if (repository, revision) in self.history:
            files, commit = self.history[repository, revision], revision
        if revision not in ("main", "v1", "refs/pr/1", commit):
            return _error("RevisionNotFound", 404, {"X-Repo-Commit": commit})
        if api:
            return self._api(repository, files, commit, rest, body)
        if repository in self.gated and not authorized:
            return _error("GatedRepo", 403)
        return self._file(repository, files, commit, "/".join(rest[2:]))

    def _create(self, asked: dict[str, Any], authorized: bool) -> Answer:
        repository = f"{asked['type']}s/{asked['organization']}/{asked['name']}"
        if not authorized or self.refused:
            return Answer(b"{}", status=self.refused or 401)
        url = f"{self.url}/{repository}"
        if repository in self.repositories:
            return Answer(json.dumps({"error": "exists", "url": url}).encode(), status=409)
        self.repositories[repository] = {".gitattributes": b"*.bin filter=lfs"}
        if asked.get("visibility") == "private":
            self.private.add(repository)
        return _json({"url": url})

    def _api(
        self, repository: str, files: dict[str, bytes], commit: str, rest: list[str], body: bytes
    ) -> Answer:
        match rest[:1]:
            case ["tree"]:
                folder = "/".join(rest[2:])
                names = [n for n in files if n.startswith(folder and f"{folder}/")]
                parents = {n[:i] for n in names for i, c in enumerate(n) if c == "/" and i > len(folder)}
                if not names:
                    return _error("EntryNotFound", 404)
                return _json([_entry(n, files) for n in (*sorted(parents), *names)])
            case ["paths-info"]:
                return _json([_entry(n, files) for n in parse_qs(body.decode())["paths"] if _entry(n, files)])
            case ["preupload"]:
                modes = [
                    {"path": f["path"], "uploadMode": "lfs" if f["size"] > 1000 else "regular"}
                    for f in json.loads(body)["files"]
                ]
                return _json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
            case ["commit"]:
                return self._commit(repository, [json.loads(line) for line in body.splitlines()])
        about = {"id": "x/y", "sha": commit, "siblings": [], "tags": []}
        return _json(about | {"private": repository in self.private})

    def _commit(self, repository: str, operations: list[dict[str, Any]]) -> Answer:
        if self.refused:
            return Answer(b"{}", status=self.refused)
        before = self.commits.get(repository, COMMIT)
        files = dict(self.repositories[repository])
        self.history[repository, before] = self.repositories[repository]
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.content.uploaded[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        self.repositories[repository] = files
        self.commits[repository] = hashlib.sha1(f"{before} {sorted(files)}".encode()).hexdigest()
        address = f"{self.url}/{repository}/commit/{self.commits[repository]}"
        return _json({"commitUrl": address, "commitOid": self.commits[repository]})

    def _file(self, repository: str, files: dict[str, bytes], commit: str, name: str) -> Answer:
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            return _error("EntryNotFound", 404, headers)
        data = files[name]
        if len(data) <= 1000:
            return Answer(data, f'"{_oid(data)}"', headers)
        linked = {"X-Linked-ETag": f'"{sha(data)}"', "X-Linked-Size": str(len(data))}
        self.content.answers[f"/{repository}/{name}"] = Answer(data, f'"{sha(data)}"', cut=self.cut)
        address = quote(f"/{repository}/{name}")
        return Answer(b"", redirect=f"{self.content.url}{address}", headers=headers | linked)

    def close(self) -> None:
        super().close()
        self.content.close()


class Content(Server):
    """The storage of a Hub's large files."""

    def __init__(self) -> None:
        super().__init__()
        self.uploaded: dict[str, bytes] = {}  # SHA-256 -> content

    def batch(self, asked: dict[str, Any]) -> Answer:
        """Return where to upload the objects that are not there."""
        objects = []
        for entry in asked["objects"]:
            upload = {"upload": {"href": f"{self.url}/upload/{entry['oid']}", "header": {}}}
            objects.append(entry | ({} if entry["oid"] in self.uploaded else {"actions": upload}))
        return _json({"transfer": "basic", "objects": objects})

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if method != "PUT":
            return super().answer(method, path, body)
        digest = path.rpartition("/")[2]
        if sha(body) != digest:
            return Answer(b"", status=400)
        self.uploaded[digest] = body
        return Answer(b"")


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Return the metadata of a file or directory of a repository, {} where there is none."""
    if name in files:
        data = files[name]
        large = {"lfs": {"oid": sha(data), "size": len(data), "pointerSize": 134}} if len(data) > 1000 else {}
        return {"type": "file", "path": name, "oid": _oid(data), "size": len(data)} | large
    is_directory = any(n.startswith(f"{name}/") for n in files)
    return {"type": "directory", "path": name, "oid": "d" * 40, "size": 0} if is_directory else {}


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})


def _error(code: str, status: int, headers: dict[str, str] | None = None) -> Answer:
    return Answer(b"{}", status=status, headers={"X-Error-Code": code} | (headers or {}))


@pytest.fixture(name="server")
def running_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@contextmanager
def file_server(root: Path) -> Iterator[FileServer]:
    """Run a `FileServer`, for which no server is known to answer range requests."""
    remote._range_servers.clear()
    server = FileServer(root)
    yield server
    server.close()


@pytest.fixture(name="hub")
def running_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for the real one, with an empty cache."""
    from huggingface_hub import HfFileSystem, constants

    for name in _HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from the environment at import
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # tests of torch's packages set it
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    remote._open_filesystem.cache_clear()
    HfFileSystem.clear_instance_cache()
    yield hub
    hub.close()
    remote._open_filesystem.cache_clear()
    HfFileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_HUB_VARIABLES, "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "PAUSE", 0.01)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()
