"""Downloads from real servers on this machine: cut, killed, changed, refused, forged."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_fast.errors import UserError
from lit_fast.storage.download import HttpError, Unreachable, download, is_whole, recorded_sha256
from tests.web import BODY, Answer, Server, md5, one_server, own_cache, servers, sha  # noqa: F401


def test_a_file_comes_whole_with_its_digest(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer()
    path = tmp_path / "d" / "f"
    assert download(f"{server.url}/f", path).sha256 == sha(BODY)
    assert path.read_bytes() == BODY
    assert recorded_sha256(path) == sha(BODY)
    assert is_whole(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["f", "f.json", "f.lock"]
    download(f"{server.url}/f", path)
    assert len(server.requests) == 1  # it is there


def test_a_cut_connection_goes_on_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer(cut=[100_000, 0, 50_000])
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert [h.get("range") for _, h in server.requests] == [
        None,
        "bytes=100000-",
        "bytes=100000-",
        "bytes=150000-",
    ]
    assert server.requests[1][1]["if-range"] == '"one"'


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_it_begins_anew(server: Server, tmp_path: Path, etag: str | None) -> None:
    server.answers["/f"] = Answer(cut=[100_000], etag=etag)
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert "range" not in server.requests[1][1]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer(cut=[100_000], ranges=False)
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_a_file_that_changed_meanwhile_is_not_mixed(server: Server, tmp_path: Path) -> None:
    path, new = tmp_path / "f", np.random.default_rng(1).bytes(280_000)
    server.answers["/f"] = Answer(cut=[100_000, 0, 0, 0, 0])
    with pytest.raises(Unreachable, match="cut after 100,000 of 300,000 bytes"):
        download(f"{server.url}/f", path)
    assert len(server.requests) == 5  # progress, and four without
    server.answers["/f"] = Answer(new, '"two"')
    assert download(f"{server.url}/f", path).sha256 == sha(new)
    assert path.read_bytes() == new


def test_a_whole_part_is_only_renamed(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer(headers={"X-Linked-ETag": f'"{sha(BODY)}"'})
    (tmp_path / "f.part").write_bytes(BODY)
    (tmp_path / "f.part.json").write_text('{"etag": "\\"one\\""}')
    assert download(f"{server.url}/f", tmp_path / "f").sha256 == sha(BODY)
    assert len(server.requests) == 1
    (tmp_path / "g.part").write_bytes(BODY + b"more")
    (tmp_path / "g.part.json").write_text('{"etag": "\\"one\\""}')
    download(f"{server.url}/f", tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_errors_are_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.answers["/f"] = Answer(failures=[status] * 3)
    download(f"{server.url}/f", tmp_path / "f")
    server.answers["/g"] = Answer(failures=[status] * 4)
    with pytest.raises(Unreachable):
        download(f"{server.url}/g", tmp_path / "g")
    assert [p for p, _ in server.requests] == ["/f"] * 4 + ["/g"] * 4


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusals_are_final(server: Server, tmp_path: Path, status: int) -> None:
    server.answers["/f"] = Answer(status=status)
    with pytest.raises(HttpError) as caught:
        download(f"{server.url}/f", tmp_path / "f")
    assert caught.value.status == status
    assert len(server.requests) == 1
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, sha(b"other")),
        ({"X-Linked-ETag": f'"{sha(b"other")}"'}, None),
        ({"x-goog-hash": f"crc32c=AAAAAA==,md5={md5(b'other')}"}, None),
    ],
)
def test_a_wrong_digest_leaves_nothing(
    server: Server, tmp_path: Path, headers: dict[str, str], expected: str | None
) -> None:
    server.answers["/f"] = Answer(headers=headers)
    with pytest.raises(UserError, match="came with the digest"):
        download(f"{server.url}/f", tmp_path / "f", sha256=expected)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("f")] == ["f.lock"]


@pytest.mark.parametrize(
    "headers", [{"X-Linked-ETag": f'"{sha(BODY)}"'}, {"x-goog-hash": f"md5={md5(BODY)}"}]
)
def test_a_right_digest_passes(server: Server, tmp_path: Path, headers: dict[str, str]) -> None:
    server.answers["/f"] = Answer(headers=headers, cut=[100_000])
    download(f"{server.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY


def test_too_large_a_file_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer()
    with pytest.raises(UserError, match="300,000 bytes, more than the limit"):
        download(f"{server.url}/f", tmp_path / "f", max_bytes=299_999)
    download(f"{server.url}/f", tmp_path / "f", max_bytes=300_000)


def test_secrets_stay_with_their_host(
    server: Server, make_server: Callable[[], Server], tmp_path: Path
) -> None:
    other = make_server()
    secret = {"Authorization": "Bearer s3cret"}
    server.answers["/f"] = Answer(redirect="/g", etag=None)
    server.answers["/g"] = Answer(redirect=f"{other.url}/h", headers={"X-Linked-ETag": f'"{sha(BODY)}"'})
    other.answers["/h"] = Answer(redirect="/h2")
    other.answers["/h2"] = Answer(redirect=f"{server.url}/i")
    server.answers["/i"] = Answer()
    assert download(f"{server.url}/f", tmp_path / "f", headers=secret).sha256 == sha(BODY)
    assert {p: h.get("authorization") for p, h in server.requests} == {
        "/f": "Bearer s3cret",
        "/g": "Bearer s3cret",
        "/i": None,
    }
    assert [h.get("authorization") for _, h in other.requests] == [None, None]


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/f", "data:text/plain,x"])
def test_nothing_but_http_is_followed(server: Server, tmp_path: Path, place: str) -> None:
    server.answers["/f"] = Answer(redirect=place)
    with pytest.raises((UserError, HttpError)):
        download(f"{server.url}/f", tmp_path / "f")
    with pytest.raises(UserError, match="not an http or https"):
        download(place, tmp_path / "g")
    assert not (tmp_path / "f").exists()


PROGRAM = "import sys; from pathlib import Path; from lit_fast.storage.download import download; "
PROGRAM += "download(sys.argv[1], Path(sys.argv[2]))"


def start(url: str, path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, str(path)], stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )


def test_a_killed_download_goes_on(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer(pause=0.05)
    path, part = tmp_path / "f", tmp_path / "f.part"
    process = start(f"{server.url}/f", path)
    for _ in range(600):
        if len(server.requests) and part.exists() and part.stat().st_size:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = part.stat().st_size
    assert 0 < done < len(BODY)
    server.answers["/f"].pause = 0
    download(f"{server.url}/f", path)
    assert path.read_bytes() == BODY
    assert server.requests[-1][1]["range"] == f"bytes={done}-"


def test_two_processes_download_once(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = Answer(pause=0.03)
    processes = [start(f"{server.url}/f", tmp_path / "f") for _ in range(2)]
    assert [p.wait(60) for p in processes] == [0, 0]
    for process in processes:
        assert process.stderr is not None
        process.stderr.close()
    assert (tmp_path / "f").read_bytes() == BODY
    assert len(server.requests) == 1
