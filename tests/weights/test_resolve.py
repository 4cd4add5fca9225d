"""Names of towers and the cache behind them, against a server on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.download import recorded_sha256
from lit_fast.storage.hub import cache_directory
from lit_fast.weights.resolve import resolve
from tests.web import BODY, Answer, Server, md5, one_server, own_cache, servers, sha  # noqa: F401

HUB = ("config.json", "model.safetensors", "preprocessor_config.json")


def repository(server: Server, name: str = "owner/name", commit: str = "a" * 40, **more: bytes) -> None:
    """A repository whose files are redirected to another path, as the Hub does with large ones."""
    files = {"config.json": b"{}", "model.safetensors": BODY, "preprocessor_config.json": b"{}"} | more
    for revision in ("main", commit):
        for file, body in files.items():
            server.answers[f"/{name}/resolve/{revision}/{file}"] = Answer(
                redirect=f"/cdn/{name}/{file}", headers={"X-Repo-Commit": commit}
            )
            server.answers[f"/cdn/{name}/{file}"] = Answer(body)


def test_an_existing_path_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_a_repository_of_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", " s3cret\n")
    repository(server)
    path = resolve("hf:owner/name")
    assert path == cache_directory() / "huggingface" / "owner" / "name" / "main"
    assert all((path / file).exists() for file in HUB)
    assert recorded_sha256(path / "model.safetensors") == sha(BODY)
    asked = [p for p, _ in server.requests if "resolve" in p]
    # The first answer named the commit; the others are of the same one.
    assert asked[0] == "/owner/name/resolve/main/config.json"
    assert all(p.startswith(f"/owner/name/resolve/{'a' * 40}/") for p in asked[1:])
    assert all(h["authorization"] == "Bearer s3cret" for _, h in server.requests)
    before = len(server.requests)
    assert resolve("hf:owner/name") == path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("hf:owner/name") == path
    assert len(server.requests) == before
    # A file that has lost bytes is fetched again.
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (path / "model.safetensors").write_bytes(BODY[:-1])
    assert resolve("hf:owner/name") == path
    assert (path / "model.safetensors").read_bytes() == BODY


def test_a_revision_and_timm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    for file in HUB[:2]:
        server.answers[f"/o/n/resolve/refs%2Fpr%2F1/{file}"] = Answer(b"{}")
        server.answers[f"/timm/vit.x/resolve/main/{file}"] = Answer(b"{}")
    assert resolve("hf:o/n@refs/pr/1").name == "refs%2Fpr%2F1"
    path = resolve("timm:vit.x")
    assert path == cache_directory() / "huggingface" / "timm" / "vit.x" / "main"
    assert not any("preprocessor" in p for p, _ in server.requests if p.startswith("/timm"))


def test_weights_in_parts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    parts = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 10 for i in (1, 2)}
    index = json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate([*parts, *parts])}}).encode()
    repository(server, **{"model.safetensors.index.json": index}, **parts)
    for key in [k for k in server.answers if k.endswith("/model.safetensors")]:
        del server.answers[key]
    path = resolve("hf:owner/name")
    assert [(path / name).read_bytes() for name in parts] == list(parts.values())
    assert json.loads((path / "files.json").read_text())["files"] == [
        "config.json",
        "preprocessor_config.json",
        "model.safetensors.index.json",
        *parts,
    ]


@pytest.mark.parametrize(
    "name", ["../../../evil.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 7, ""]
)
def test_parts_cannot_escape(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: object, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    index = json.dumps({"weight_map": {"w": name}}).encode()
    repository(server, **{"model.safetensors.index.json": index})
    for key in [k for k in server.answers if k.endswith("/model.safetensors")]:
        del server.answers[key]
    with pytest.raises(UserError, match="is damaged"):
        resolve("hf:owner/name")
    assert not list(tmp_path.rglob("*evil*"))


def test_only_safetensors(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.answers["/o/n/resolve/main/config.json"] = Answer(b"{}")
    with pytest.raises(UserError, match=r"hf:o/n has no model\.safetensors; weights in other formats"):
        resolve("hf:o/n")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_repositories(server: Server, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.answers["/o/n/resolve/main/config.json"] = Answer(status=status)
    hint = "does not exist: check the name" if status == 404 else "accept its licence and set HF_TOKEN"
    with pytest.raises(UserError, match=hint) as caught:
        resolve("hf:o/n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "hf:../../x", "hf:a", "hf:a/b/c", "hf:a/..", "hf:a/b@../c", "hf:a/b@", "hf:a/b?x", "hf:/a/b", "hf:a/b#c",
        "timm:a/b", "timm:..", "timm:", "hf:", "big_vision/../x", "big_vision//x", "big_vision/a b", "augreg/../x",
        "augreg/B_9", "B_8.npz", "x" * 5000, "a\0b", "",
    ],
)  # fmt: skip
def test_bad_names_are_refused_without_a_request(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)
    assert not server.requests
    assert not (tmp_path / "cache").exists()


def test_a_token_with_a_line_break_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "s3\ncret")
    with pytest.raises(UserError, match="HF_TOKEN") as caught:
        resolve("hf:o/n")
    assert "cret" not in str(caught.value)


def test_archives_of_the_buckets(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.removeprefix("http://"))
    stem = "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"
    place = f"vit_models/augreg/{stem}.npz"
    goog = {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5(BODY)}"}
    server.answers[f"/{place}"] = Answer(headers=goog)
    server.answers["/big_vision/siglip/x.npz"] = Answer()
    path = resolve("augreg/B_8")
    assert path == cache_directory() / "storage.googleapis.com" / place
    assert path.read_bytes() == BODY
    assert resolve(f"augreg/{stem}") == resolve(f"augreg/{stem}.npz") == path
    assert len(server.requests) == 1
    assert resolve("big_vision/siglip/x") == resolve("big_vision/siglip/x.npz")
    with pytest.raises(UserError, match=r"unknown; nearest: augreg/B_8"):
        resolve("augreg/B_88")


def test_a_tower_by_name_is_that_of_the_file(
    server: Server, monkeypatch: pytest.MonkeyPatch, tiny_vit: Path
) -> None:
    from lit_fast.towers.tower import load_tower

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    server.answers["/big_vision/tiny.npz"] = Answer(tiny_vit.read_bytes())
    tower, local = load_tower("big_vision/tiny"), load_tower(str(tiny_vit))
    assert tower.source == "big_vision/tiny"
    assert tower.provenance("float32")["identity"] == local.provenance("float32")["identity"]
    path = resolve("big_vision/tiny")
    assert recorded_sha256(path) == tower.sha256
    # A bit of the cached file flips: it has its size still, and is not what was downloaded.
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError):
        load_tower("big_vision/tiny")


def test_offline_says_what_to_bring_and_where(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("LIT_FAST_OFFLINE", "1")
    with pytest.raises(UserError, match="offline") as caught:
        resolve("hf:o/n")
    place = cache_directory() / "huggingface" / "o" / "n" / "main"
    assert f"bring {server.url}/o/n/resolve/main/config.json and put it at {place}" in str(caught.value)
    # What was put there by hand is taken.
    place.mkdir(parents=True)
    for file in HUB[:2]:
        (place / file).write_bytes(b"{}")
    assert resolve("hf:o/n") == place
    assert recorded_sha256(place / "model.safetensors") is None
    assert not server.requests


def test_an_unreachable_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.close()
    with pytest.raises(UserError, match=r"cannot be downloaded: .*refused; bring .* local file"):
        resolve("hf:o/n")


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("LIT_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "lit_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "lit_fast"
