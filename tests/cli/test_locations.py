"""Every command with every location it takes: URLs that cannot be used there are one line and leave no file."""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lit_fast.cli.main import COMMANDS, main
from lit_fast.config import settings
from tests.helpers import encoded, picture
from tests.synthetic import make_dataset

# {u} is the location in question; {b} has the files of the fixture `base`.
CASES = """
index {u} --out new
index {b}/pairs.tar --out {u}
index {b}/x.csv --out new --images {u}
index {b}/pairs.tar --out new --classnames {u}
index {b}/pairs.tar --out new --templates {u}
index {u} --relocate /a=/b
index {b}/d --relocate {u}=/b
index {b}/d --relocate {b}={u}
embed {u} --tower {b}/tiny.npz
embed {b}/d --tower {u} --name other
embed {b}/d --tower {b}/tiny.npz --name other --scratch {u}
verify {u}
verify {b}/d --sample 0 --json {u}
tokenize {u} --train-vocab 284
tokenize {b}/d --tokenizer {u} --name other
import-features {u} --out new --tower t
import-features {b}/f.npy --out {u} --tower t
import-features {b}/f.npy --out new --tower t --captions-table {u}
push {u} a/b
pull a/b {u}
train {u} --workdir new --dataset {b}/d
train {b}/c.toml --workdir {u} --dataset {b}/d
train {b}/c.toml --workdir new --dataset {u}
train {b}/c.toml --workdir new --dataset {b}/d --stream.corrupt_images 0.5 --stream.noise {u}
train {b}/c.toml --workdir new --dataset {b}/d --text.init {u}
train {b}/c.toml --workdir new --dataset {b}/d --evaluate.zero_shot {u}
train {b}/c.toml --workdir new --dataset {b}/d --evaluate.retrieval {u}
race {u} --workdir new --dataset {b}/d --towers tiny
race {b}/c.toml --workdir {u} --dataset {b}/d --towers tiny
race {b}/c.toml --workdir new --dataset {u} --towers tiny
race {b}/c.toml --workdir new --dataset {b}/d --towers tiny --out {u}
race {b}/c.toml --workdir new --dataset {b}/d --towers tiny --json {u}
plan {u} --topology gpu:h100
plan {b}/c.toml --topology gpu:h100 --dataset {u}
plan {b}/c.toml --topology gpu:h100 --json {u}
plan {b}/c.toml --topology gpu:h100 --plan.tower {u}
export {u} --out new
export {b}/run --out {u}
export {b}/run --out {u} --format open_clip
export {b}/run --out new --tower {u}
export {b}/run --out new --format onnx --classes {u}
export {b}/run --out new --format onnx --classes {b}/labels.txt --templates {u}
classify {u} --model {b}/run --labels a,b
classify {b}/0.jpg --model {u} --labels a,b
classify {b}/0.jpg --model {b}/run --tower {u} --labels a,b
classify {b}/0.jpg --model {b}/run --labels-file {u}
classify {b}/0.jpg --model {b}/run --labels a,b --templates {u}
classify {b}/0.jpg --model {b}/run --labels a,b --json {u}
search {u} dog --model {b}/run
search {b}/d dog --model {u}
search {b}/d --image {u} --model {b}/run
search {b}/d --image {b}/0.jpg --model {b}/run --tower {u}
search {b}/d dog --model {b}/run --page {u}
search {b}/d dog --model {b}/run --json {u}
serve {u} {b}/d --port 0
serve {b}/run {u} --port 0
serve {b}/run {b}/d --port 0 --tower {u}
eval {u} --retrieval {b}/d
eval {b}/run --zero-shot {u}
eval {b}/run --retrieval {u}
eval {b}/run --few-shot {u} {b}/d
eval {b}/run --zero-shot {b}/classes --classnames {u}
eval {b}/run --zero-shot {b}/classes --templates {u}
eval {b}/run --zero-shot {b}/classes --labels {u}
eval {b}/run --retrieval {b}/d --json {u}
eval {b}/run --retrieval {b}/d --page {u}
compare {u} {b}/run
compare {b}/run --json {u}
compare {b}/run --out {u}
info {u}
info {b}/d --json {u}
demo --out {u}
"""
MISTAKES = ("gs:/b/x", "s3:b/x", "gopher://b/x")
NO_LOCATIONS = {
    "--seed", "--captions", "--image", "--key", "--label", "--language", "--split", "--append", "--name",
    "--preprocess", "--resolution", "--gelu", "--pool", "--reduced-decode", "--views", "--batch-size", "--workers",
    "--dtype", "--max-pixels", "--shard-of", "--sample", "--repair", "--train-vocab", "--max-length", "--pad-id",
    "--model-type", "--format", "--features", "--public", "--license", "--revision", "--profile-steps", "--topology",
    "--mfu", "--price", "--storage-price", "--no-search", "--largest-batch", "--step", "--average", "--vision",
    "--nearest-pixels",
    "--push", "--top", "--host", "--port", "--help", "--towers", "--seeds", "--by", "--arch", "--backend",
    *(f"--{key}" for key in settings() if key != "dataset"),
}  # fmt: skip
NAMES = {  # that are no locations in these commands
    "verify": {"--tower"}, "import-features": {"--tower"}, "push": {"--tower", "--tokenizer"},
    "pull": {"--tower", "--tokenizer"}, "classify": {"--labels"}, "eval": {"--classes"},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(trained_run: Path, tiny_vit: Path) -> Path:
    path = trained_run.parent
    (path / "tiny.npz").write_bytes(tiny_vit.read_bytes())
    (path / "labels.txt").write_text("a dog\na cat\n")
    (path / "x.csv").write_text("image,caption\n0.jpg,a\n")
    (path / "0.jpg").write_bytes(encoded(picture(1)))
    make_dataset(path / "classes", 10)
    np.save(path / "f.npy", np.ones((3, 4), np.float32))
    return path


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_a_url_with_a_mistake_is_one_line_and_leaves_nothing(
    case: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LIT_FAST_OFFLINE", "1")
    for url in MISTAKES[:1] if "--text.init" in case else MISTAKES:  # this one compiles first
        assert main(case.format(u=url, b=base).split()) == 2, url
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-fast: error")]
        assert len(lines) == 1, lines
        assert url in lines[0] or "--relocate" in lines[0] or "needs no --scratch" in lines[0]
        assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_a_case_or_no_location(name: str) -> None:
    parser = argparse.ArgumentParser()
    next(e for e in entry_points(group="lit_fast.commands") if e.name == name).load()(parser)
    options = {
        a.option_strings[-1]
        for a in vars(parser)["_actions"]
        if a.option_strings and a.option_strings != ["-h"]
    }
    cases = [case.split() for case in CASES.strip().splitlines()]
    tried = {w for words in cases if words[0] == name for w, u in pairwise(words) if "{u}" in u}
    missing = options - tried - NO_LOCATIONS - NAMES.get(name, set())
    assert not missing, "add a line to CASES for each, or name it in NO_LOCATIONS"
