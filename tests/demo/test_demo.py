"""The demo: its commands, its behaviour when stopped, its examples."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import demo_tower as pretrain
from lit_fast.config_io import load_config
from lit_fast.demo import demo
from lit_fast.demo.page import confusions, gallery
from lit_fast.demo.scenes import NOVEL, PAIRS
from lit_fast.demo.tars import write_captioned, write_classification
from lit_fast.embed.index import index_dataset
from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAIN_SCENES", "RETRIEVAL_SCENES", "ZERO_SHOT_SCENES"):
        monkeypatch.setattr(demo, name, 16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Commands are noted, not run; `embed` of the second set fails."""
    made: list[tuple[list[str], dict[str, str]]] = []

    def start(command: list[str], env: dict[str, str]) -> Any:
        made.append((command[3:], env))
        return SimpleNamespace(wait=lambda: 2 if len(made) == 5 else 0)

    monkeypatch.setattr(subprocess, "Popen", start)
    return made


def test_demo_stops_at_a_failing_command(small: None, calls: list, tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(UserError, match="`lit-fast embed` ended with status 2"):
        demo.run_demo(tmp_path / "demo")
    assert [command[0] for command, _ in calls] == ["index", "index", "index", "embed", "embed"]
    assert capfd.readouterr().err.count("\n$ lit-fast ") == 5


def test_draw_scenes_keeps_sets_that_exist(small: None, tmp_path: Path) -> None:
    demo.draw_scenes(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["retrieval", "train", "zeroshot"]
    assert [p.name for p in (tmp_path / "train").iterdir()] == ["00000.tar"]
    first = (tmp_path / "train" / "00000.tar").stat().st_mtime_ns
    demo.draw_scenes(str(tmp_path))
    assert (tmp_path / "train" / "00000.tar").stat().st_mtime_ns == first


def test_run_command_gives_training_four_devices(calls: list, tmp_path: Path) -> None:
    commands = demo.demo_commands(tmp_path)
    assert [c[0] for c in commands] == [*["index"] * 3, *["embed"] * 3, "tokenize", "train", "eval"]
    for command in (commands[0], commands[-2]):
        demo.run_command(command)
    flag = "--xla_force_host_platform_device_count=4"
    assert calls[1][1]["XLA_FLAGS"].endswith(flag)
    assert f"XLA_FLAGS={flag} lit-fast train" in demo.as_typed(commands[-2])


@pytest.mark.parametrize(("stop", "passed_on"), [(KeyboardInterrupt, []), (SystemExit, ["terminate"])])
def test_run_command_when_stopped_waits_for_the_process(
    stop: type[BaseException], passed_on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def wait() -> int:
        done.append("wait")
        if len(done) == 1:
            raise stop
        return 0

    process = SimpleNamespace(wait=wait, terminate=lambda: done.append("terminate"))
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: process)
    with pytest.raises(stop):
        demo.run_command(["index"])
    assert done == ["wait", *passed_on, "wait"]


def test_demo_in_unwritable_directory_raises_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into"):
        demo.run_demo(tmp_path / "file" / "demo")


def test_demo_config_is_valid() -> None:
    config = load_config(demo.CONFIG)
    assert config.stream.global_batch % 4 == 0


def test_demo_tower_is_small_and_equals_the_pretrained_model() -> None:
    assert Path(demo.TOWER).stat().st_size <= 2_000_000
    tower = load_tower(demo.TOWER, preprocess="tf-squash")
    assert (tower.preprocess.size, tower.architecture) == (64, pretrain.MODEL.architecture)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    features = tower.embed(tower.params, images)
    tokens = pretrain.tokens(tower.params, images)
    assert tokens.shape == (3, 1 + pretrain.GRID**2, 128)
    np.testing.assert_allclose(features, tokens[:, 0], rtol=0, atol=2e-5)


def test_augreg_npz_round_trips_the_weights(tmp_path: Path) -> None:
    vit = pretrain.init(0)["vit"]
    path = tmp_path / "vit.npz"
    path.write_bytes(pretrain.augreg_npz(vit))
    read = load_tower(str(path)).params
    assert jax.tree.structure(read) == jax.tree.structure(vit)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(vit), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8)


class FakeRun:
    """Image i is the unit vector i; texts are embedded by `texts`."""

    def __init__(self, rows: int, texts: Any) -> None:
        self.rows, self.texts = rows, texts

    def image_embeddings(self, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(self.rows), np.eye(self.rows, dtype=np.float32)

    def embed_text(self, texts: list[str]) -> np.ndarray:
        return self.texts(texts)


def test_gallery_shows_right_and_wrong_queries(tmp_path: Path) -> None:
    write_captioned(tmp_path / "tars", 20, 1, NOVEL)
    dataset = index_dataset([str(tmp_path / "tars")], tmp_path / "set", seed=0)
    captions = [c for block in dataset.iter_captions() for c in block]
    owner = {text: row for row, texts in enumerate(captions) for text in texts}
    eye = np.eye(20, dtype=np.float32)

    def embed(texts: list[str]) -> np.ndarray:  # the second half of the rows is found last
        return np.stack([eye[owner[t]] * (1 if owner[t] < 10 else -1) for t in texts])

    right, wrong = gallery(FakeRun(20, embed), tmp_path / "set")  # type: ignore[arg-type]
    assert len(right) == len(wrong) == 8
    sources = set()
    for _, figures in right:
        assert [f.kind for f in figures] == ["right", "", "", "", ""]
        sources.add(figures[0].source)
    for _, figures in wrong:
        assert [f.kind for f in figures] == ["", "", "", "", "", "right"]
        assert figures[5].text == "no. 20, -1.000"
        sources.add(figures[5].source)
    assert len(sources) == 16


def test_confusions_give_shares_of_predicted_names(tmp_path: Path) -> None:
    write_classification(tmp_path / "tars", 16, 1, NOVEL)
    index_dataset([str(tmp_path / "tars" / "test")], tmp_path / "set", seed=0)

    def embed(texts: list[str]) -> np.ndarray:  # every picture is nearest to "red circle"
        return np.stack([np.full(16, 1.0 if "red circle" in t else 0.1, np.float32) for t in texts])

    found = confusions(FakeRun(16, embed), tmp_path / "set")  # type: ignore[arg-type]
    assert [name for name, _ in found] == [" ".join(pair) for pair in PAIRS if pair in NOVEL]
    assert all(shares == {"red circle": 1.0} for _, shares in found)
