"""Files and directories are complete or absent."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.atomic import remove_temporary_files, replacing, replacing_directory, write_atomic


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_remove_temporary_files_keeps_all_others(tmp_path: Path) -> None:
    kept = {"a", "a.1.tmp", ".b.tmp", ".lock", ".lock.12.tmp", ".c.1x.tmp"}
    for name in kept | {".a.12.tmp", ".00000.array_record.7.tmp"}:
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_temporary_files(tmp_path / "absent")


def test_replacing_names_the_file_in_errors_of_writing(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/f'") as raised,
        replacing(tmp_path / "f"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert raised.value.filename == str(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_write_atomic_to_a_device_or_pipe_does_not_replace_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, b"data")
    assert os.read(reader, 100) == b"data"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    # A link, as /dev/null itself could be replaced by whoever may write to /dev.
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "full", b"data")
    assert (tmp_path / "full").is_symlink()


def test_write_atomic_to_an_open_file_adds_to_it(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.write(b"a ")
        write_atomic(f"/proc/self/fd/{file.fileno()}", b"b")
    assert (tmp_path / "file").read_bytes() == b"a b"


def test_write_atomic_to_a_url_that_is_no_bucket_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError,
        match=r"^hf://bucket/f is a URL that cannot be used here; give a local path, gs://BUCKET/NAME",
    ):
        write_atomic("hf://bucket/f", b"")
