"""Upload to the Hugging Face Hub: its own package talks to a server on this machine that answers as the Hub does."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from lit_fast.errors import UserError
from lit_fast.train.export.push import check_push, push
from tests.trained import command

pytestmark = pytest.mark.usefixtures("token")


class Hub:
    """Repositories by name, and what was committed to them."""

    def __init__(self):
        self.private, self.files, self.status = {}, {}, 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                name = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(\?.*)?", self.path)
                private = outer.private.get(name[1])
                if private is None:
                    self.answer({"error": "Repository not found"}, 404)
                else:
                    self.answer({"id": name[1], "private": private, "siblings": [], "tags": []})

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                assert self.headers["Authorization"] == "Bearer hf_token"
                if self.path == "/api/repos/create":
                    outer.create(self, json.loads(body))
                elif self.path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    how = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
                    self.answer({"files": how})
                else:
                    name = re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path)[1]
                    outer.commit(name, [json.loads(line) for line in body.splitlines()])
                    url = f"{outer.url}/{name}/commit/1"
                    self.answer({"success": True, "commitOid": "1", "commitUrl": url})

            def answer(self, value, status=200):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def create(self, to, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if self.status != 200:
            to.answer({"error": "You do not have the right to create it"}, self.status)
        elif name in self.private:
            to.answer({"error": "it exists", "url": f"{self.url}/{name}"}, 409)
        else:
            self.private[name] = asked.get("private", asked.get("visibility") == "private")
            to.answer({"url": f"{self.url}/{name}", "name": name})

    def commit(self, name, lines):
        for line in lines:
            if line["key"] == "file":
                self.files[name, line["value"]["path"]] = base64.b64decode(line["value"]["content"])

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # HF_ENDPOINT, which is read only once
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "model/README.md").write_text('---\nlicense: "mit"\n---\n# model\n')
    return tmp_path / "model"


def test_push_uploads_the_directory_as_private(server, folder, capsys):
    for _ in range(2):  # again: into the same repository
        push(folder, "someone/some-model", public=False)
        assert server.private == {"someone/some-model": True}
        assert server.files == {("someone/some-model", p.name): p.read_bytes() for p in folder.iterdir()}
        assert f"uploaded to {server.url}/someone/some-model" in capsys.readouterr().out


def test_push_to_a_public_repository_needs_public(server, folder):
    server.private["someone/open"] = False
    with pytest.raises(UserError, match=r"was not uploaded: .*someone/open is public; add --public"):
        push(folder, "someone/open", public=False)
    assert not server.files
    push(folder, "someone/open", public=True)
    push(folder, "someone/new", public=True)
    assert server.private == {"someone/open": False, "someone/new": False}
    assert len(server.files) == 4


def test_export_with_push_writes_the_repository_into_the_files(server, trained_run, tmp_path):
    """open_clip asks the repository named in the files for the tokenizer."""
    name, out = "someone/some-model", tmp_path / "out"
    command("export", trained_run, "--out", out, "--format", "open_clip", "--nearest-pixels", "--push", name)
    assert server.private == {name: True}
    config = json.loads(server.files[name, "open_clip_config.json"])
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == name
    assert f'get_tokenizer("hf-hub:{name}")' in server.files[name, "README.md"].decode()


def test_push_refused_fails_in_one_line(server, folder):
    server.status = 403
    with pytest.raises(
        UserError, match=r"was not uploaded: .*403.*; upload it with: hf upload a/b \S+model --private$"
    ) as error:
        push(folder, "a/b", public=False)
    assert "\n" not in str(error.value)
    server.close()
    with pytest.raises(UserError, match=r"was not uploaded: .*; upload it with: hf upload a/b \S+model$"):
        push(folder, "a/b", public=True)


@pytest.mark.parametrize("name", ["name", "a/b/c", "../b", "a/", "-/", "a b/c", "a/b\n"])
def test_check_push_malformed_name_raises(name):
    with pytest.raises(UserError, match="is not of the form OWNER/NAME"):
        check_push(name)


def test_check_push_without_token_raises(monkeypatch, tmp_path):
    check_push("a/b")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="log in with: hf auth login, or set HF_TOKEN"):
        check_push("a/b")
