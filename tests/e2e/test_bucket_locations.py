"""Commands with all that they read and write in a bucket, and the requests that they make."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lit_fast
from lit_fast.cli.main import main
from lit_fast.errors import UserError
from lit_fast.runs.remote_checkpoints import push_checkpoint
from lit_fast.storage import buckets, cache, remote
from lit_fast.storage.atomic import copy_files, write_atomic
from lit_fast.storage.files import list_names, read_bytes, walk_files
from lit_fast.towers.tower import load_tower
from tests.buckets import bucket  # noqa: F401
from tests.gcs import FakeGcs, running_gcs
from tests.helpers import encoded, picture


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    """A server of buckets, in an empty directory and with an empty cache."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "_stores", {})
    remote._open_filesystem.cache_clear()
    with running_gcs() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def upload_run(run: Path, url: str) -> None:
    """Write a run with both its checkpoints into a bucket as `train` does."""
    copy_files(run, [name for name in walk_files(run) if not name.startswith("checkpoints/")], url)
    for step in (2, 4):
        push_checkpoint(str(run), step, url, lambda: None)


def command(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def requested(server: FakeGcs) -> list[str]:
    """Return the names of the objects whose content was read since the last call."""
    found = [
        re.search(r"/o/([^?]+)\?.*alt=media", path) for method, path, _ in server.requests if method == "GET"
    ]
    server.requests.clear()
    return [match[1].replace("%2F", "/") for match in found if match]


def test_commands_read_and_write_in_a_bucket(
    gcs: FakeGcs, trained_run: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    base, here = "gs://bucket", tmp_path / "empty"
    upload_run(trained_run, f"{base}/runs/r")
    copy_files(trained_run.parent / "d", list(walk_files(trained_run.parent / "d")), f"{base}/d")
    write_atomic(f"{base}/tiny.npz", tiny_vit.read_bytes())
    write_atomic(f"{base}/labels.txt", b"a dog\na cat\n")
    write_atomic(f"{base}/0.jpg", encoded(picture(0)))
    write_atomic(f"{base}/c.toml", (trained_run.parent / "c.toml").read_bytes())
    command("export", f"{base}/runs/r", "--tower", f"{base}/tiny.npz", "--out", f"{base}/model")
    uploads = [path for method, path, _ in gcs.requests if method == "POST" and "name=model%2F" in path]
    assert "config.json" in uploads[-1]
    assert "config.json" in list_names(f"{base}/model")
    model = lit_fast.load(f"{base}/model")
    local = lit_fast.load(trained_run)
    np.testing.assert_array_equal(model.embed_text(["a dog"]), local.embed_text(["a dog"]))
    assert model.name == "model"
    np.testing.assert_array_equal(
        model.embed_image([f"{base}/0.jpg"]), local.embed_image([picture_file(tmp_path)])
    )

    options = ["--model", f"{base}/model"]
    command(
        "classify",
        f"{base}/0.jpg",
        *options,
        "--labels-file",
        f"{base}/labels.txt",
        "--json",
        f"{base}/out/c.json",
    )
    command(
        "search", f"{base}/d", "dog", *options, "--page", f"{base}/out/s.html", "--json", f"{base}/out/s.json"
    )
    evaluated = ["eval", f"{base}/runs/r", "--retrieval", f"{base}/d"]
    command(*evaluated, "--json", f"{base}/out/e.json", "--page", f"{base}/out/e.html")
    command(
        "compare",
        f"{base}/runs/r",
        trained_run,
        "--out",
        f"{base}/out/p.html",
        "--json",
        f"{base}/out/p.json",
    )
    command("info", f"{base}/d", "--json", f"{base}/out/i.json")
    command("verify", f"{base}/d", "--sample", 0, "--json", f"{base}/out/v.json")
    command("plan", f"{base}/c.toml", "--topology", "gpu:h100", "--no-search", "--json", f"{base}/out/l.json")
    outputs = "c.json s.html s.json e.json e.html p.html p.json i.json v.json l.json"
    assert list_names(f"{base}/out") == sorted(outputs.split())
    assert json.loads(read_bytes(f"{base}/out/c.json"))["model"] == "model"
    assert not list(here.iterdir())


def picture_file(tmp_path: Path) -> Path:
    path = tmp_path / "0.jpg"
    path.write_bytes(encoded(picture(0)))
    return path


def test_a_run_in_a_bucket_is_read_without_optimizer_state_and_other_checkpoints(
    gcs: FakeGcs, trained_run: Path
) -> None:
    run = "gs://bucket/r"
    upload_run(trained_run, run)
    requested(gcs)
    for words in (["info", run], ["compare", run]):
        command(*words)
        assert not [name for name in requested(gcs) if re.match(r"r/checkpoints/\d+/", name)]
    command("eval", run, "--retrieval", trained_run.parent / "d")
    names = requested(gcs)
    assert {n.split("/")[2:4][0] for n in names if re.match(r"r/checkpoints/\d+/", n)} == {"4"}
    assert {n.split("/")[3] for n in names if n.startswith("r/checkpoints/4/")} <= {
        "params", "meta", "_CHECKPOINT_METADATA", "commit_success.txt",
    }  # fmt: skip
    command("eval", run, "--retrieval", trained_run.parent / "d")
    assert not [name for name in requested(gcs) if re.match(r"r/checkpoints/\d+/", name)]  # in the cache


def test_weights_in_a_bucket_are_those_of_the_local_file(
    bucket: str,  # noqa: F811
    tiny_vit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_PART", 10_000)  # several, and a last one that is shorter
    url = f"{bucket}/towers/tiny.npz"
    write_atomic(url, tiny_vit.read_bytes())
    tower, local = load_tower(url), load_tower(str(tiny_vit))
    assert (tower.source, tower.name, tower.sha256) == (url, "tiny", local.sha256)
    np.testing.assert_array_equal(tower.params["cls"], local.params["cls"])
    for size in (0, 1, 9_999, 10_000, 20_000, 20_001):
        data = os.urandom(size)
        write_atomic(f"{bucket}/f", data)
        assert Path(cache.local_copy(f"{bucket}/f", in_parts=True)).read_bytes() == data
    with pytest.raises(FileNotFoundError):
        cache.local_copy(f"{bucket}/absent", in_parts=True)
    with pytest.raises(UserError, match="neither a file nor a name"):
        load_tower(f"{bucket}/absent.npz")
