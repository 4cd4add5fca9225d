"""`index`: order, completeness, skipped rows and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import lit_fast.embed.row_reader
from lit_fast.cli.main import main
from lit_fast.data.dataset import open_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.errors import UserError
from lit_fast.utils.permutation import permutation
from tests.embed.contents import keys, tree
from tests.helpers import encoded, picture, samples, write_tar


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for n in range(4):
        write_tar(tmp_path / "tars" / f"{n:05d}.tar", samples(10, first=10 * n))
    return tmp_path / "tars"


def test_permutation_is_fixed_for_good() -> None:
    np.testing.assert_array_equal(permutation(8, 0, 1), [4, 1, 7, 0, 3, 5, 6, 2])
    assert sorted(permutation(1000, 3)) == list(range(1000))
    assert list(permutation(100, 3)) != list(permutation(100, 4))
    assert list(permutation(100, 3)) != list(permutation(100, 3, 0))
    assert len(permutation(0, 1)) == 0


def test_every_row_once_with_its_own_image_and_captions(tars: Path, tmp_path: Path) -> None:
    dataset = index_dataset([str(tars)], tmp_path / "d", seed=0)
    assert (dataset.rows, dataset.captions, dataset.labelled) == (40, 80, 0)
    assert sorted(keys(dataset)) == [f"{i:09d}" for i in range(40)]
    [block], [captions] = list(dataset.iter_blocks()), list(dataset.iter_captions())
    for key, source, offset, size, texts in zip(
        block.keys, block.sources, block.offsets, block.sizes, captions, strict=True
    ):
        with open(dataset.sources[source].path, "rb") as file:
            file.seek(offset)
            assert file.read(size) == encoded(picture(int(key)))
        assert texts == [f"picture {int(key)}, caption {j}" for j in range(2)]


def test_order_depends_on_the_seed_and_not_on_the_arguments(tars: Path, tmp_path: Path) -> None:
    one = index_dataset([str(tars)], tmp_path / "1", seed=0)
    same = index_dataset([f"{tars}/0000{n}.tar" for n in (2, 0, 1, 3)], tmp_path / "2", seed=0)
    other = index_dataset([str(tars)], tmp_path / "3", seed=1)
    assert tree(one.path) == tree(same.path)
    assert keys(one) != sorted(keys(one))
    assert keys(other) != keys(one)
    assert sorted(keys(other)) == sorted(keys(one))
    first, second = (index_dataset([f"{tars}/00000.tar"], tmp_path / f"one{i}", seed=i) for i in (0, 1))
    assert keys(first) != keys(second)  # within a file as well


def test_groups_keep_files_together(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_fast.embed.row_reader, "GROUP_ROWS", 15)
    dataset = index_dataset([str(tars)], tmp_path / "d", seed=0)
    files = [int(key) // 10 for key in keys(dataset)]
    assert len(set(files[:20])) == len(set(files[20:])) == 2
    assert sorted(keys(dataset)) == [f"{i:09d}" for i in range(40)]


def test_left_out_is_counted_named_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [*samples(2), ("lost.txt", b"x"), ("mute.jpg", b"x")])
    write_tar(tmp_path / "b.tar", [*samples(2, first=1), *samples(1, first=1)])
    (tmp_path / "c.tar").write_bytes(b"not a tar")
    dataset = index_dataset([f"{tmp_path}/?.tar"], tmp_path / "d", seed=0)
    assert dataset.rows == 4  # 000000001 of a.tar and of b.tar
    assert dataset.left_out == {
        "replaced by a later member of the same name": 3,
        "no image (.jpg, .jpeg, .png, .webp, .gif or .bmp)": 1,
        "no caption and no label": 1,
        "file damaged or cut off": 1,
    }
    out, err = capsys.readouterr()
    assert "indexed 4 rows with 8 captions from 3 files" in out
    assert "left out 6: " in out
    assert "1 no caption and no label (mute in a.tar)" in out
    assert "c.tar is not a tar file" in err
    listed = [json.loads(line) for line in (Path(dataset.path) / "left_out.jsonl").read_text().splitlines()]
    assert {
        "key": "lost",
        "file": str(tmp_path / "a.tar"),
        "reason": "no image (.jpg, .jpeg, .png, .webp, .gif or .bmp)",
    } in listed
    assert len(listed) == 6


def test_clip_benchmark_layout(tmp_path: Path) -> None:
    root = tmp_path / "wds_animals"
    rows = [m for i in range(3) for m in ((f"s{i}.webp", b"x"), (f"s{i}.cls", b"%d" % i))]
    write_tar(root / "test" / "0.tar", rows)
    (root / "classnames.txt").write_text("cat\ndog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    dataset = index_dataset([str(root)], tmp_path / "d", seed=0)
    assert dataset.classnames == ("cat", "dog")
    assert dataset.templates == ("a photo of a {c}.", "{c}")
    assert (dataset.rows, dataset.labelled, dataset.captions) == (2, 2, 0)
    assert dataset.left_out == {"label outside the 2 class names": 1}
    [block] = dataset.iter_blocks()
    assert {k: l for k, l in zip(block.keys, block.labels, strict=True)} == {"s0": 0, "s1": 1}


def test_class_names_are_stored_only_if_all_sources_agree(tars: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "w" / "0.tar", [("s.jpg", b"x"), ("s.cls", b"0")])
    (tmp_path / "w" / "classnames.txt").write_text("cat\n")
    assert index_dataset([str(tars), str(tmp_path / "w")], tmp_path / "d", seed=0).classnames == ()


@pytest.mark.parametrize("is_link", [True, False])
def test_index_the_same_file_under_two_names_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_link: bool
) -> None:
    write_tar(tmp_path / "a.tar", [("s.jpg", b"x"), ("s.txt", b"y")])
    write_tar(tmp_path / "c.tar", [("s.jpg", b"x"), ("s.txt", b"z")])
    index_dataset([str(tmp_path / "a.tar"), str(tmp_path / "c.tar")], tmp_path / "d")
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "b.tar").symlink_to("a.tar") if is_link else shutil.copy(
        tmp_path / "a.tar", tmp_path / "b.tar"
    )
    index_dataset([str(tmp_path / "b.tar")], tmp_path / "d", append=True)
    assert re.search(r"warning: \S*b.tar has the same content as \S*a.tar: ", capsys.readouterr().err)


def test_retrieval_sets_have_a_caption_per_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "w" / "test" / "0.tar", [("s.jpg", b"x"), ("s.txt", b"one\ntwo\n")])
    (tmp_path / "w" / "dataset_type.txt").write_text("retrieval\n")
    assert list(index_dataset([str(tmp_path / "w")], tmp_path / "d", seed=0).iter_captions()) == [
        [["one", "two"]]
    ]


def test_indexing_again(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d"
    index_dataset([str(tars)], out, seed=0)
    before = tree(out)
    index_dataset([str(tars)], out, seed=0)
    assert "already indexed: 40 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="never changes; choose another --out"):
        index_dataset([str(tars)], out, seed=1)
    with pytest.raises(UserError, match="choose another --out"):
        index_dataset([f"{tars}/00000.tar"], out, seed=0)
    assert tree(out) == before


def test_refusals_leave_nothing_behind(tars: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "useless.tar", [("a.jpg", b"x")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep")
    for sources, out, message in (
        (
            [str(tmp_path / "useless.tar")],
            "d",
            r"no usable row in .*/useless.tar; left out 1: 1 no caption and no label \(a in useless.tar\)",
        ),
        ([f"{tars}/9*.tar"], "d", "matches no file"),
        ([str(tars)], "full", "holds other files .thesis.txt"),
        ([str(tars)], "useless.tar", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            index_dataset(sources, tmp_path / out, seed=0)
    assert not (tmp_path / "d").exists()
    assert tree(tmp_path / "full") == {"thesis.txt": b"keep"}


def test_killed_indexing_leaves_no_dataset_and_can_be_redone(tars: Path, tmp_path: Path) -> None:
    script = (
        "import dataclasses, sys, time, lit_fast.embed.row_reader as r\n"
        "r.GROUP_ROWS = 10\n"
        "tar = r.FORMATS['tar']\n"
        "def slow(*a):\n    time.sleep(0.2); return tar.read(*a)\n"
        "r.FORMATS['tar'] = dataclasses.replace(tar, read=slow)\n"
        "from lit_fast.embed.index import index_dataset\n"
        "index_dataset([sys.argv[1]], sys.argv[2], seed=0)\n"
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tars), str(killed)], stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (killed / "index").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match="not a dataset"):
        open_dataset(killed)
    index_dataset([str(tars)], whole, seed=0)
    index_dataset([str(tars)], killed, seed=0)
    assert tree(killed) == tree(whole)


def test_command_line(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", f"{tars}/*.tar", "--out", str(tmp_path / "d"), "--seed", "3"]) == 0
    assert re.search(r"indexed 40 rows with 80 captions from 4 files into .*/d\n", capsys.readouterr().out)
    assert main(["index", f"{tars}/*.tar", "--out", str(tmp_path / "d"), "--seed", "-1"]) == 2
    assert main(["index", "ftp://x/y.tar", "--out", str(tmp_path / "e")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_real_data(realdata: Path, tmp_path: Path) -> None:
    flowers = index_dataset([str(realdata / "wds_tf_flowers")], tmp_path / "flowers", seed=0)
    assert (flowers.rows, flowers.labelled, flowers.left_out) == (400, 400, {})
    assert flowers.classnames == ("daisy", "dandelion", "rose", "sunflower", "tulip")
    assert flowers.templates[0] == "a photo of a {c}."
    train = index_dataset([f"{realdata}/flickr8k/train/{{00000..00005}}.tar"], tmp_path / "train", seed=0)
    assert (train.rows, train.captions, train.left_out) == (6000, 30_000, {})  # nine of them are repeated
