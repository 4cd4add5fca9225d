"""A dataset that has grown, and one that is too large to look at row by row."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import BFLOAT16, Features, Manifest, features_digest, open_features
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.errors import UserError
from lit_fast.storage.text_files import read_json
from lit_fast.towers.tower import load_tower
from tests.embed.test_extract import progress_of, start, tree
from tests.helpers import encoded, picture, write_tar


def part(path: Path, first: int, count: int) -> Path:
    files = [encoded(picture(i, 40, 36)) for i in range(64)]
    members = []
    for i in range(first, first + count):
        members += [(f"{i}.jpg", files[i % 64] if i % 400 else b"no image"), (f"{i}.txt", b"x")]
    return write_tar(path, members)


def grow(tmp_path: Path) -> Dataset:
    """By 1300 rows: the second shard is filled up and a third one begins."""
    new = part(tmp_path / "1.tar", 1500, 1300)
    return index_dataset([str(tmp_path / "0.tar"), str(new)], tmp_path / "d", append=True)


@pytest.fixture
def dataset(tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """1500 rows, one and a half small shards."""
    return index_dataset([str(part(tmp_path / "0.tar", 0, 1500))], tmp_path / "d", seed=0)


def same_bytes_as_at_once(dataset: Dataset, tower: Path, name: str) -> bool:
    embed_dataset(dataset.path, str(tower), name="at_once", batch_size=2)
    return tree(Path(dataset.path) / "features" / name) == tree(Path(dataset.path) / "features" / "at_once")


def test_embed_of_a_grown_dataset_keeps_the_old_features(
    dataset: Dataset, tiny_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("grown", "marked"):
        embed_dataset(dataset.path, str(tiny_vit), name=name, batch_size=2)
    # values that no embedding makes: whoever embeds the old rows again destroys them
    marked = open_features(dataset, "marked")
    recorded = marked.manifest(1)
    values = np.arange(recorded.rows * 32).reshape(-1, 32).astype(BFLOAT16)
    marked.array()[1024:1500].write(values).result()
    marked.write_manifest(replace(recorded, features=features_digest(values)))
    dataset = grow(tmp_path)
    for opening in (lambda f: f.invalid_rows(), lambda f: f.read_all(), lambda f: f.mean({})):
        with pytest.raises(
            UserError, match=r"(missing|grown|has 1,500 rows).*finish.* with: lit-fast embed .*tiny.npz"
        ):
            opening(open_features(dataset, "grown"))
    capsys.readouterr()
    assert main(["verify", str(dataset.path), "--tower", "grown"]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG  features grown, shard ") == out.count("WRONG  ") == 2
    for name in ("grown", "marked"):
        assert (
            main(["embed", str(dataset.path), "--tower", str(tiny_vit), "--name", name, "--batch-size", "2"])
            == 0
        )
    assert "embedded 2,800 rows" in capsys.readouterr().out
    assert same_bytes_as_at_once(dataset, tiny_vit, "grown")
    got = open_features(dataset, "marked").read_all()
    np.testing.assert_array_equal(got[1024:1500], values)
    np.testing.assert_array_equal(got[1500:], open_features(dataset, "grown").read_all()[1500:])


def test_embed_of_a_grown_dataset_killed_ends_with_the_same_bytes(
    dataset: Dataset, tiny_vit: Path, tmp_path: Path
) -> None:
    embed_dataset(dataset.path, str(tiny_vit), name="killed", batch_size=2)
    old = open_features(dataset, "killed").read_all()
    dataset = grow(tmp_path)
    killed = Path(dataset.path) / "features" / "killed"
    rng = random.Random(0)
    for number in range(4):
        process = start(dataset.path, tiny_vit, "killed")
        goal = progress_of(killed) + rng.random() * 100
        while process.poll() is None and progress_of(killed) < goal:
            time.sleep(0.001)
        process.send_signal([signal.SIGKILL, signal.SIGTERM][number % 2])
        process.communicate()
        # finished shards stay readable
        manifest = Features(dataset, "killed", read_json(killed / "tower.json")).manifest(1)
        assert manifest.rows in (476, 1024)
    embed_dataset(dataset.path, str(tiny_vit), name="killed", batch_size=2)
    np.testing.assert_array_equal(open_features(dataset, "killed").read_all()[:1500], old)
    assert same_bytes_as_at_once(dataset, tiny_vit, "killed")


def test_embed_of_a_grown_dataset_killed_before_the_manifest_ends_with_the_same_bytes(
    dataset: Dataset, tiny_vit: Path, tmp_path: Path
) -> None:
    embed_dataset(dataset.path, str(tiny_vit), name="grown", batch_size=2)
    old = (Path(dataset.path) / "features/grown/manifest/00001.json").read_bytes()
    dataset = grow(tmp_path)
    embed_dataset(dataset.path, str(tiny_vit), name="grown", batch_size=2)
    features = open_features(dataset, "grown")
    Path(features.manifest_path(1)).write_bytes(old)
    embed_dataset(dataset.path, str(tiny_vit), name="grown", batch_size=2)
    assert same_bytes_as_at_once(dataset, tiny_vit, "grown")


def test_embed_of_a_grown_dataset_refuses_damaged_old_rows(
    dataset: Dataset, tiny_vit: Path, tmp_path: Path
) -> None:
    embed_dataset(dataset.path, str(tiny_vit), name="grown", batch_size=2)
    features = open_features(dataset, "grown")
    features.array()[1030].write(np.ones(32, BFLOAT16)).result()
    dataset = grow(tmp_path)
    with pytest.raises(UserError, match=r"shard 1 is damaged, .* verify .* --tower grown --repair"):
        embed_dataset(dataset.path, str(tiny_vit), name="grown", batch_size=2)
    assert main(["verify", str(dataset.path), "--tower", "grown", "--repair"]) == 0
    other = features.manifest(0)
    features.write_manifest(replace(features.manifest(1), rows=400, keys=other.keys))
    with pytest.raises(UserError, match="belongs to other rows"):
        embed_dataset(dataset.path, str(tiny_vit), name="grown", batch_size=2)


def test_a_finished_dataset_of_a_million_rows_is_opened_without_its_rows(
    tmp_path: Path, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither index nor captions nor features are there to be read."""
    index_dataset([str(part(tmp_path / "0.tar", 1, 20))], tmp_path / "d", seed=0)
    file = tmp_path / "d" / "dataset.json"
    value = json.loads(file.read_text())
    value |= {"rows": 1_000_000, "shard_keys": [f"{s:032x}" for s in range(16)]}
    file.write_text(json.dumps(value))
    for records in (tmp_path / "d").glob("*/*.array_record"):
        records.unlink()
    dataset = open_dataset(tmp_path / "d")
    provenance = load_tower(str(tiny_vit)).provenance("float32")
    features = Features(dataset, "tiny", provenance)
    Path(features.path).mkdir(parents=True)
    (Path(features.path) / "tower.json").write_text(json.dumps(provenance))
    for shard, keys in enumerate(dataset.shard_keys):
        rows = features.shard_rows(shard)
        features.write_manifest(Manifest(shard, shard * 65_536, rows, keys, features.identity, {}))
    capsys.readouterr()
    assert main(["embed", str(dataset.path), "--tower", str(tiny_vit)]) == 0
    assert "is complete: 1,000,000 rows, 1,000,000 valid" in capsys.readouterr().out
