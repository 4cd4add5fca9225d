"""Upload to the Hugging Face Hub: huggingface_hub talks to a server on this machine that answers as the Hub does."""

import base64
import json
import re

import pytest
from huggingface_hub import constants

from lit_fast.errors import UserError
from lit_fast.train.export.writer import check_push, push
from tests.trained import command
from tests.web import Answer, Server

pytestmark = pytest.mark.usefixtures("token")


class Hub(Server):
    """Repositories by name, and the files that were committed to them."""

    def __init__(self):
        super().__init__()
        self.private, self.files, self.status = {}, {}, 200

    def answer(self, method, path, body):
        headers = self.requests[-1][2]
        if method == "GET":
            name = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(\?.*)?", path)[1]
            if name not in self.private:
                return reply({"error": "Repository not found"}, 404)
            return reply({"id": name, "private": self.private[name], "siblings": [], "tags": []})
        assert headers["authorization"] == "Bearer hf_token"
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return reply({"errors": [], "warnings": []})
        if "/preupload/" in path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return reply(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
            )
        name = re.match(r"/api/models/([^/]+/[^/]+)/commit/main", path)[1]
        for entry in map(json.loads, body.splitlines()):
            if entry["key"] == "file":
                self.files[name, entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return reply({"success": True, "commitOid": "1", "commitUrl": f"{self.url}/{name}/commit/1"})

    def create(self, request):
        name = f"{request['organization']}/{request['name']}"
        if self.status != 200:
            return reply({"error": "You do not have the right to create it"}, self.status)
        if name in self.private:
            return reply({"error": "it exists", "url": f"{self.url}/{name}"}, 409)
        self.private[name] = request.get("private", request.get("visibility") == "private")
        return reply({"url": f"{self.url}/{name}", "name": name})


def reply(value, status=200):
    return Answer(json.dumps(value).encode(), status=status, headers={"Content-Type": "application/json"})


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
