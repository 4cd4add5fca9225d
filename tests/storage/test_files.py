"""Files at paths and URLs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.files import open_read, read_range, read_whole, size_and_etag
from lit_fast.storage.text_files import read_text
from tests.web import file_server


@pytest.mark.parametrize("remote", [False, True])
def test_reads_of_a_path_and_of_a_url_are_equal(tmp_path: Path, remote: bool) -> None:
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    with file_server(tmp_path) as server:
        root = server.url if remote else str(tmp_path)
        with open_read(f"{root}/f.txt") as file:
            assert (file.seek(3), file.read(3)) == (3, b"caf")
        assert read_range(f"{root}/f.txt", 3, 6) == b"caf"
        assert read_text(f"{root}/f.txt") == "café"
        assert read_whole(f"{root}/f.txt", 8) == (tmp_path / "f.txt").read_bytes()
        with pytest.raises(UserError, match="has more than 7 bytes"):
            read_whole(f"{root}/f.txt", 7)
        size, etag = size_and_etag(f"{root}/f.txt")
        assert (size, bool(etag)) == (8, remote)
        assert read_whole(f"{root}/absent", 1) is None
        assert read_text(f"{root}/absent") is None
        for function in (open_read, size_and_etag):
            with pytest.raises(UserError, match=r"absent (cannot be read: No such file|does not exist)"):
                function(f"{root}/absent")


def test_a_url_of_an_unknown_scheme_is_refused_in_one_line(tmp_path: Path) -> None:
    for function in (open_read, size_and_etag, lambda url: read_range(url, 0, 1), read_text):
        with pytest.raises(
            UserError, match=r"^gopher://host/f cannot be read; give a local path or a URL with https://"
        ):
            function("gopher://host/f")
