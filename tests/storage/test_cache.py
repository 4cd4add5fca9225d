"""Files of buckets and other servers in the cache, from a server on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage.cache import cache_directory, cached_file
from tests.web import BODY, Answer, Server, md5, own_cache, running_server, sha  # noqa: F401


def test_cached_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer()
    path = cached_file("name", f"{server.url}/f", "d/f")
    assert Path(path) == tmp_path / "cache" / "d" / "f"
    assert Path(path).read_bytes() == BODY
    server.requests.clear()
    assert cached_file("name", f"{server.url}/f", "d/f") == path
    assert not server.requests
    assert [p.name for p in Path(path).parent.iterdir()] == ["f"]


def test_cached_file_a_cut_connection_is_retried(server: Server) -> None:
    server.answers["/f"] = Answer(cut=[1, 100_000, 0, 50_000])
    assert Path(cached_file("name", f"{server.url}/f", "f")).read_bytes() == BODY


@pytest.mark.parametrize(
    ("headers", "digest"),
    [({}, sha(b"other")), ({"x-goog-hash": f"crc32c=AAAAAA==,md5={md5(b'other')}"}, "")],
)
def test_cached_file_a_wrong_digest_leaves_nothing(
    server: Server, tmp_path: Path, headers: dict[str, str], digest: str
) -> None:
    server.answers["/f"] = Answer(headers=headers)
    with pytest.raises(UserError, match="has the digest"):
        cached_file("name", f"{server.url}/f", "f", digest)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("headers", "digest"), [({}, sha(BODY)), ({"x-goog-hash": f"md5={md5(BODY)}"}, ""), ({}, "")]
)
def test_cached_file_a_right_digest_passes(server: Server, headers: dict[str, str], digest: str) -> None:
    server.answers["/f"] = Answer(headers=headers)
    assert Path(cached_file("name", f"{server.url}/f", "f", digest)).read_bytes() == BODY


@pytest.mark.parametrize(("status", "problem"), [(404, "does not exist"), (403, "may not be read")])
def test_cached_file_a_refusal_is_one_line(server: Server, status: int, problem: str) -> None:
    server.answers["/f"] = Answer(status=status)
    with pytest.raises(
        UserError, match=f"name cannot be downloaded: .*{problem}.*, or download .* on another machine"
    ) as caught:
        cached_file("name", f"{server.url}/f", "f")
    assert "\n" not in str(caught.value)


def test_cached_file_offline_names_the_file_to_bring(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_FAST_OFFLINE", "1")
    url, path = f"{server.url}/f", tmp_path / "cache" / "f"
    with pytest.raises(
        UserError, match=rf"offline\); download {url} to {path} on another machine, or give the path"
    ):
        cached_file("name", url, "f")
    path.parent.mkdir()
    path.write_bytes(b"brought")
    assert cached_file("name", url, "f") == str(path)
    assert not server.requests


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_directory() == str(tmp_path / "cache")
    monkeypatch.delenv("LIT_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == str(tmp_path / "lit_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == str(Path.home() / ".cache" / "lit_fast")


def test_cached_file_that_changes_meanwhile_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/f"] = Answer()
    answer = server.answer

    def change(method: str, path: str, body: bytes) -> Answer:
        found = answer(method, path, body)
        if len(server.requests) == 4:  # after sizes and ranges were asked for
            server.answers["/f"] = Answer(etag='"two"')
        return found

    monkeypatch.setattr(server, "answer", change)
    with pytest.raises(
        UserError, match="changed while it was downloaded; rerun the same command, or download"
    ):
        cached_file("name", f"{server.url}/f", "f")


def test_cache_directory_without_a_home_is_that_of_the_user_among_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LIT_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id without a name
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    directory = Path(cache_directory())
    assert directory == tmp_path / f"lit_fast-{os.getuid()}"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert cache_directory() == str(directory)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    directory.rename(tmp_path / "lit_fast-54321")
    with pytest.raises(UserError, match="belongs to another user; set LIT_FAST_CACHE"):
        cache_directory()
