"""Files that are read as lines, and directories that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.files import read_lines, replacing_directory


def test_read_lines_returns_stripped_lines(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("\ufeffa cat\n  a dog \n\n", "utf-8")
    assert read_lines(file) == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("data", "message"), [(b"\n \n", "is empty"), (b"\xff\xfe", "UTF-8"), (b"a\n\nb", "is empty in line 2")]
)
def test_read_lines_of_other_content_raises(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_lines(file)


def test_read_lines_of_no_file_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_lines(tmp_path / "absent")


def test_replacing_directory_appears_at_the_end_with_readable_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with replacing_directory(target) as temporary:
        assert not target.exists()
        os.close(os.open(f"{temporary}/a", os.O_CREAT, 0o600))
        os.mkdir(f"{temporary}/inside")
        Path(temporary, "inside", "b").write_text("b")
    assert (target / "inside" / "b").read_text() == "b"
    expected = 0o666 & (target / "inside").stat().st_mode
    assert (target / "a").stat().st_mode & 0o777 == expected
    assert os.listdir(target.parent) == ["out"]


def test_replacing_directory_after_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: str) -> None:
        Path(directory, "a").write_text("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing_directory(tmp_path / "out") as temporary:
        fail(temporary)
    assert not os.listdir(tmp_path)


def test_replacing_directory_of_a_full_directory_raises_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    with pytest.raises(OSError, match="not empty"), replacing_directory(tmp_path / "out") as temporary:
        Path(temporary, "a").write_text("a")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["kept"]
