"""`index --append`: old rows keep their numbers, and a kill leaves the old dataset or the new one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lit_fast.data.records
from lit_fast.cli.main import main
from lit_fast.data.dataset import Source, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.images.reader import ImageReader
from lit_fast.data.tokens import open_tokens
from lit_fast.embed.index import index_dataset
from lit_fast.embed.tokenize import tokenize_dataset
from lit_fast.errors import UserError
from tests.embed.contents import captions, keys, patch_shard_rows, tree
from tests.helpers import encoded, picture, samples, write_tar


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for n in range(3):
        write_tar(tmp_path / "tars" / f"{n}.tar", samples(10, first=10 * n))
    return tmp_path / "tars"


def test_new_rows_follow_the_old_ones(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d"
    old = index_dataset([f"{tars}/1.tar"], out, seed=0)
    before, digest = keys(old), old.shard_keys[0]
    with pytest.raises(
        UserError, match=r"without .*/0.tar and 1 more; to add their rows at its end, give --append"
    ):
        index_dataset([str(tars)], out, seed=0)
    new = index_dataset([str(tars)], out, seed=0, append=True)
    assert keys(new)[:10] == before
    assert sorted(keys(new)) == [f"{i:09d}" for i in range(30)]
    assert (new.rows, new.captions, new.generation, len(new.sources)) == (30, 60, 1, 3)
    assert new.prefix_digest(0, 10) == digest
    assert new.prefix_digest(0, 30) == new.shard_keys[0]
    reader = ImageReader(new)
    for row, (key, texts) in enumerate(zip(keys(new), captions(new), strict=True)):
        assert reader.read(row) == encoded(picture(int(key)))
        assert texts == [f"picture {int(key)}, caption {j}" for j in range(2)]
    assert sorted(p.name for p in out.iterdir()) == ["captions-1", "dataset.json", "index-1"]
    assert "indexed 20 rows with 40 captions from 2 files into" in capsys.readouterr().out
    again = tree(out)
    for append in (True, False):
        index_dataset([str(tars)], out, seed=0, append=append)
        assert "already indexed: 30 rows with 60 captions" in capsys.readouterr().out
    assert tree(out) == again
    # Only the new ones may be named as well.
    write_tar(tmp_path / "more.tar", samples(15, first=25))
    second = keys(new)
    third = index_dataset([f"{tmp_path}/more.tar"], out, seed=0, append=True)
    assert keys(third)[:30] == second
    # A key is unique within its source: the equal ones of the other tars name other images.
    assert (third.rows, third.generation, third.left_out) == (45, 2, {})


def test_what_append_refuses(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    index_dataset([f"{tars}/0.tar", f"{tars}/1.tar"], out, seed=0)
    before = tree(out)
    write_tar(tmp_path / "useless.tar", [("a.jpg", b"x")])
    with pytest.raises(UserError, match=r"no usable row in .*; left out 1"):
        index_dataset([f"{tmp_path}/useless.tar"], out, seed=0, append=True)
    with pytest.raises(UserError, match="another seed"):
        index_dataset([str(tars)], out, seed=1, append=True)
    data = (tars / "0.tar").read_bytes()
    (tars / "0.tar").write_bytes(data[:-512])
    for sources in ([str(tars)], [f"{tars}/2.tar"]):
        with pytest.raises(UserError, match=r"0\.tar has"):
            index_dataset(sources, out, seed=0, append=True)
    (tars / "0.tar").unlink()
    with pytest.raises(UserError, match=r"0\.tar .* cannot be read"):
        index_dataset([f"{tars}/2.tar"], out, seed=0, append=True)
    (tars / "0.tar").write_bytes(data)
    (tars / "classnames.txt").write_text("cat\n")
    assert index_dataset([f"{tars}/2.tar"], out, seed=0, append=True).classnames == ()
    assert tree(out) != before


@pytest.mark.parametrize(
    ("first", "second"), [(1, 1), (1023, 3), (1024, 1), (3000, 3000), (4096, 5000), (4100, 60)]
)
def test_a_grown_dataset_equals_one_written_at_once(
    first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, digests and counts, for all positions of the border in block, record file and shard."""
    patch_shard_rows(monkeypatch, 2048)
    monkeypatch.setattr(lit_fast.data.records, "FILE_RECORDS", 2)
    sources = [Source("/nowhere.tar", 1)]
    rows = [
        Row(f"k{i}", 0, i, 1, ("a", f"b{i}")[: i % 3], i % 2 - 1, ("en", "")[: i % 3] if i % 5 else ())
        for i in range(first + second)
    ]
    for path, parts in (("one", [rows]), ("two", [rows[:first], rows[first:]])):
        grow = None
        for part in parts:
            writer = DatasetWriter(tmp_path / path, grow=grow)
            for row in part:
                writer.add(row)
            grow = writer.finish(seed=0, sources=sources)
    one, two = open_dataset(tmp_path / "one"), open_dataset(tmp_path / "two")
    assert list(one.iter_blocks()) == list(two.iter_blocks())
    assert captions(one) == captions(two)
    for name in ("rows", "captions", "captionless", "labelled", "languages", "shard_keys", "digest"):
        assert getattr(one, name) == getattr(two, name), name
    assert [p.name for p in sorted((tmp_path / "two").iterdir())] == ["captions-1", "dataset.json", "index-1"]


def test_killed_at_any_step_of_the_end(tars: Path, tmp_path: Path) -> None:
    """The process dies before and after the one atomic step; the next command finds one whole dataset."""
    index_dataset([f"{tars}/0.tar"], tmp_path / "start", seed=0)
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    whole = index_dataset([str(tars)], tmp_path / "whole", seed=0, append=True)
    script = (
        "import os, sys, signal, lit_fast.embed.index, lit_fast.data.dataset_writer as d\n"
        "def die(*a): os.kill(os.getpid(), signal.SIGKILL)\n"
        "setattr(d, sys.argv[1], die)\n"
        "from lit_fast.cli.main import main\n"
        "main(sys.argv[2:])\n"
    )
    for number, (step, rows) in enumerate(
        (("write_json", 10), ("open_dataset", 30), ("remove_other_generations", 30))
    ):
        out = tmp_path / f"killed{number}"
        shutil.copytree(tmp_path / "start", out)
        command = ["index", str(tars), "--out", str(out), "--append"]
        done = subprocess.run([sys.executable, "-c", script, step, *command], capture_output=True)
        assert done.returncode == -signal.SIGKILL
        left = open_dataset(out)
        assert (left.rows, len(keys(left)), len(captions(left))) == (rows,) * 3
        assert len(list(out.glob("index*"))) == 2
        assert main(command) == 0
        assert tree(out) == tree(whole.path)


def test_killed_while_writing(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    index_dataset([f"{tars}/0.tar"], out, seed=0)
    before = tree(out)
    script = (
        "import dataclasses, sys, time, lit_fast.embed.row_reader as r\n"
        "r.GROUP_ROWS = 10\n"
        "tar = r.FORMATS['tar']\n"
        "def slow(*a):\n    time.sleep(0.3); return tar.read(*a)\n"
        "r.FORMATS['tar'] = dataclasses.replace(tar, read=slow)\n"
        "from lit_fast.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = ["index", str(tars), "--out", str(out), "--append"]
    process = subprocess.Popen([sys.executable, "-c", script, *command], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "index-1").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert open_dataset(out).rows == 10
    assert (out / "index-1").exists()
    index_dataset([f"{tars}/0.tar"], out, seed=0)
    assert tree(out) == before
    assert index_dataset([str(tars)], out, seed=0, append=True).rows == 30


def test_tokens_of_a_grown_dataset_are_made_again(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    index_dataset([f"{tars}/0.tar"], out, seed=0)
    tokenize_dataset(out, train_vocab=282, name="words")
    before = open_tokens(open_dataset(out)).tokenizer().model
    grown = index_dataset([str(tars)], out, seed=0, append=True)
    with pytest.raises(
        UserError, match="may have grown; make the tokens again with: lit-fast tokenize"
    ) as error:
        open_tokens(grown)
    assert main(shlex.split(str(error.value).partition("with: lit-fast ")[2])) == 0
    assert open_tokens(grown).meta["captions"] == 60
    tokenize_dataset(out, train_vocab=282, name="words")
    tokens = open_tokens(grown)
    assert tokens.meta["captions"] == 60
    assert tokens.tokenizer().model == before
