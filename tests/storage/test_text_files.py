"""Files that are read as lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.text_files import read_lines


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
