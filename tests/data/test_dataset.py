"""A dataset's own file, edited or damaged: one line, whatever reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.data.dataset import Block, compact_block
from lit_fast.embed.index import index_dataset
from tests.helpers import write_tar

SOURCE = {"path": "/data/0.tar", "bytes": 10}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """`dataset.json` of one row."""
    tar = write_tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.txt", b"a")])
    return Path(index_dataset([str(tar)], tmp_path / "d").path, "dataset.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", "1"), ("rows", 1.5), ("rows", -1), ("rows", 70_000), ("rows", True), ("captions", []),
        ("shard_keys", []), ("shard_keys", [1]), ("seed", None), ("left_out", {"damaged": "1"}),
        ("sources", ["/data/0.tar"]), ("sources", [SOURCE | {"path": 1}]), ("sources", [SOURCE | {"bytes": "1"}]),
        ("sources", [SOURCE | {"path": "\ud800"}]), ("sources", [SOURCE | {"names": [1]}]), ("sources", {"a": 1}),
        ("classnames", [1]), ("languages", {"en": []}), ("generation", "1"), ("block", 1), ("format", {}),
    ],
)  # fmt: skip
def test_dataset_json_with_wrong_value_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    for command in ("info", "verify"):
        capsys.readouterr()
        assert main([command, str(file.parent)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(file) in error


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"format": 1}'])
def test_dataset_json_with_other_content_is_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file.write_text(text)
    capsys.readouterr()
    assert main(["info", str(file.parent)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error


@given(keys=st.lists(st.text(), min_size=1, max_size=20))
def test_compact_block_has_the_keys_and_places_of_the_block(keys: list[str]) -> None:
    numbers = [2**40 + i for i in range(len(keys))]
    block = Block(keys, numbers, numbers, numbers, numbers, numbers, [["de"]] * len(keys), numbers)
    compact = compact_block(block.encode())
    assert list(compact.keys) == keys
    assert list(compact.keys[1:]) == keys[1:]
    assert list(compact.offsets) == list(compact.sizes) == list(compact.sources) == numbers
    assert [compact.check(i) for i in range(len(keys))] == numbers
