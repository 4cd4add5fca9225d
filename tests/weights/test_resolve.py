"""Names of towers and their files, from servers on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.cache import cache_directory
from lit_fast.weights.resolve import resolve, resolve_tokenizer, weights_digest
from tests.web import BODY, COMMIT, Answer, Hub, Server, own_cache, running_hub, running_server, sha  # noqa: F401

FILES = {"config.json": b"{}", "model.safetensors": BODY, "preprocessor_config.json": b"{}"}


def test_resolve_an_existing_path_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "spec", ["hf:owner/name", "hf-hub:owner/name", "owner/name", "hf:owner/name@v1", "owner/name@v1"]
)
def test_resolve_a_repository_gives_its_folder(hub: Hub, spec: str) -> None:
    hub.add("owner/name", FILES | {"pytorch_model.bin": b"pickle"})
    directory = Path(resolve(spec))
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == FILES
    assert directory.name == COMMIT
    assert weights_digest(directory / "model.safetensors") == sha(BODY)
    hub.close()
    assert resolve(spec) == str(directory)


def test_resolve_timm_takes_no_preprocessor(hub: Hub) -> None:
    hub.add("timm/vit.x", FILES)
    assert sorted(p.name for p in Path(resolve("timm:vit.x")).iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_resolve_weights_in_parts(hub: Hub) -> None:
    parts = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 10 for i in (1, 2)}
    index = json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate([*parts, *parts])}}).encode()
    hub.add("o/n", {"config.json": b"{}", "model.safetensors.index.json": index, **parts})
    directory = Path(resolve("hf:o/n"))
    assert {name: (directory / name).read_bytes() for name in parts} == parts


@pytest.mark.parametrize(
    "name", ["../../../evil.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 7, ""]
)
def test_resolve_parts_cannot_escape(hub: Hub, name: object, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"w": name}}).encode()
    hub.add("o/n", {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(UserError, match=r"is not a \.safetensors file beside it"):
        resolve("hf:o/n")
    assert not list(tmp_path.rglob("*evil*"))


def test_resolve_other_weights_than_safetensors_are_refused(hub: Hub) -> None:
    hub.add("o/n", {"config.json": b"{}", "pytorch_model.bin": BODY})
    with pytest.raises(
        UserError, match=r"hf:o/n has no model\.safetensors; choose a repository with \.safetensors weights"
    ):
        resolve("hf:o/n")
    assert not any("pytorch_model" in path for path in hub.downloads)


def test_resolve_a_huge_config_is_refused(hub: Hub) -> None:
    hub.add("o/n", {"config.json": b" " * 10_000_001})
    with pytest.raises(UserError, match=r"has 10,000,001 bytes in config\.json"):
        resolve("hf:o/n")


@pytest.mark.parametrize(
    "spec",
    [
        "hf:../../x", "hf:a", "hf:a/b/c", "hf:a/..", "hf:a/b@../c", "hf:a/b@", "hf:a/b?x", "hf:/a/b", "hf:a/b#c",
        "timm:a/b", "timm:..", "timm:", "hf:", "big_vision/../x", "big_vision//x", "big_vision/a b", "augreg/../x",
        "augreg/B_9", "B_8.npz", "a/B_8.npz", "x" * 5000, "a\0b", "", "ftp://a/b.npz", "./a/b",
    ],
)  # fmt: skip
def test_resolve_bad_names_are_refused_without_a_request(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", hub.url)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)
    assert not hub.requests
    assert not (tmp_path / "cache").exists()


def test_resolve_archives_of_the_buckets(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.removeprefix("http://"))
    stem = "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"
    place = f"vit_models/augreg/{stem}.npz"
    server.answers[f"/{place}"] = Answer()
    server.answers["/big_vision/siglip/x.npz"] = Answer()
    path = resolve("augreg/B_8")
    assert path == f"{cache_directory()}/storage.googleapis.com/{place}"
    assert Path(path).read_bytes() == BODY
    server.requests.clear()
    assert resolve(f"augreg/{stem}") == resolve(f"augreg/{stem}.npz") == path
    assert not server.requests
    assert resolve("big_vision/siglip/x") == resolve("big_vision/siglip/x.npz")
    with pytest.raises(UserError, match=r"unknown; nearest: augreg/B_8"):
        resolve("augreg/B_88")


def test_load_tower_by_name_is_that_of_the_file(
    server: Server, monkeypatch: pytest.MonkeyPatch, tiny_vit: Path
) -> None:
    from lit_fast.towers.tower import load_tower

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    server.answers["/big_vision/tiny.npz"] = Answer(tiny_vit.read_bytes())
    tower, local = load_tower("big_vision/tiny"), load_tower(str(tiny_vit))
    assert tower.source == "big_vision/tiny"
    assert tower.provenance("float32")["identity"] == local.provenance("float32")["identity"]
    # A bit of the cached file flips.
    path = Path(resolve("big_vision/tiny"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError):
        load_tower("big_vision/tiny")


def test_weights_digest_a_damaged_cache_is_refused(hub: Hub) -> None:
    hub.add("o/n", FILES)
    path = Path(resolve("hf:o/n")) / "model.safetensors"
    path.resolve().write_bytes(BODY[:-1])
    with pytest.raises(UserError, match="is damaged; delete it to have it downloaded again"):
        weights_digest(path)


@pytest.mark.parametrize("file", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_resolve_tokenizer_finds_the_sentencepiece_model(hub: Hub, file: str) -> None:
    hub.add("owner/name", {"config.json": b"{}", file: b"model"})
    path, name = resolve_tokenizer("hf:owner/name")
    assert (Path(path).read_bytes(), name) == (b"model", "name")


def test_resolve_tokenizer_of_a_path_is_itself(hub: Hub, tmp_path: Path) -> None:
    for path in (tmp_path / "spm.model", "absent/spm.model"):
        assert resolve_tokenizer(path) == (str(path), "spm")
    assert not hub.requests


def test_resolve_tokenizer_without_a_sentencepiece_model_is_one_line(hub: Hub) -> None:
    hub.add("o/n", {"vocab.txt": b"[PAD]"})
    with pytest.raises(
        UserError, match=r"hf:o/n has none of tokenizer\.model, .*; give a sentencepiece model"
    ):
        resolve_tokenizer("hf:o/n")


def test_resolve_an_absent_path_that_looks_like_a_repository_says_both(hub: Hub) -> None:
    for function in (resolve, resolve_tokenizer):
        with pytest.raises(
            UserError, match=r"^runs/b8 does not exist here, and hf:runs/b8 does not exist or is private"
        ):
            function("runs/b8")
