"""Objects in buckets: the same functions as for local files, conditional writes, leases, problems in one line."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_fast.errors import UserError
from lit_fast.storage import buckets
from lit_fast.storage.atomic import link_or_copy, replacing, replacing_directory, write_atomic
from lit_fast.storage.cache import local_copy
from lit_fast.storage.files import (
    directory_size,
    exists,
    is_directory,
    is_file,
    list_directories,
    list_names,
    read_bytes,
    read_into,
    read_tail,
    remove,
    remove_tree,
    sha256,
    size,
    walk_files,
)
from lit_fast.storage.lock import InUseError, Lock, LostLockError
from lit_fast.storage.paths import join
from lit_fast.storage.text_files import read_json, write_json
from tests.buckets import bucket  # noqa: F401
from tests.gcs import running_gcs


def test_files_of_a_bucket_behave_as_local_ones(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    for root in (str(tmp_path / "d"), join(bucket, "some where", "d")):
        assert not exists(root)
        assert list_names(root) == []
        write_atomic(join(root, "a.bin"), bytes(range(100)))
        write_json(join(root, "x", "ü #?%.json"), {"a": 1})
        with replacing(join(root, "x", "c")) as file:
            Path(file).write_text("c")
        link_or_copy(join(root, "x", "c"), join(root, "x", "d"))
        with replacing_directory(join(root, "new")) as directory:
            Path(directory, "y").mkdir()
            Path(directory, "y", "z").write_bytes(b"z")
        assert (exists(root), is_file(root), is_directory(root)) == (True, False, True)
        assert (exists(join(root, "a.bin")), is_file(join(root, "a.bin"))) == (True, True)
        assert not is_directory(join(root, "a.bin"))
        assert not exists(join(root, "a"))  # the beginning of a name is no directory
        assert list_names(root) == ["a.bin", "new", "x"]
        assert list_directories(root) == ["new", "x"]
        assert sorted(walk_files(root)) == ["a.bin", "new/y/z", "x/c", "x/d", "x/ü #?%.json"]
        assert read_json(join(root, "x", "ü #?%.json")) == {"a": 1}
        first, second = bytearray(3), bytearray(2)
        read_into(join(root, "a.bin"), 10, memoryview(first), memoryview(second))
        assert (bytes(first), bytes(second)) == (bytes([10, 11, 12]), bytes([13, 14]))
        assert read_tail(join(root, "a.bin"), 2) == bytes([98, 99])
        with pytest.raises(ValueError, match="ends early"):
            read_into(join(root, "a.bin"), 95, memoryview(bytearray(10)))
        assert sha256(join(root, "a.bin")) == sha256(local_copy(join(root, "a.bin")))
        assert (size(join(root, "a.bin")), directory_size(join(root, "x"))) == (
            100,
            2 + len('{\n  "a": 1\n}\n'),
        )
        remove(join(root, "a.bin"))
        remove(join(root, "a.bin"))
        with pytest.raises(FileNotFoundError):
            read_bytes(join(root, "a.bin"))
        remove_tree(root)
        assert not exists(root)


def test_write_with_a_generation_succeeds_only_on_it(bucket: str) -> None:  # noqa: F811
    url = f"{bucket}/a"
    first = buckets.write(url, b"1", buckets.ABSENT)
    assert first
    assert not buckets.write(url, b"2", buckets.ABSENT)
    second = buckets.write(url, b"2", first)
    assert not buckets.write(url, b"3", first)
    assert buckets.read(url) == (b"2", second)
    assert buckets.read(url, unless=second) == (None, second)
    assert not buckets.delete(url, first)
    assert buckets.delete(url, second)
    assert buckets.read(url) == (None, buckets.ABSENT)


def test_local_copy_follows_its_object(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path))
    url = f"{bucket}/d/model.bin"
    with pytest.raises(FileNotFoundError):
        local_copy(url)
    write_atomic(url, b"one")
    path = local_copy(url)
    assert (Path(path).name, Path(path).read_bytes()) == ("model.bin", b"one")
    Path(path).write_bytes(b"xxx")  # is not copied again
    assert Path(local_copy(url)).read_bytes() == b"xxx"
    write_atomic(url, b"other")
    assert Path(local_copy(url)).read_bytes() == b"other"
    assert not Path(path).exists()


def test_one_of_two_locks_of_a_bucket_is_taken(bucket: str) -> None:  # noqa: F811
    lock = Lock(f"{bucket}/r/.lock", "r", "wait")
    with pytest.raises(InUseError, match="is being written by"):
        Lock(f"{bucket}/r/.lock", "r", "wait")
    lock.check()
    write_atomic(f"{bucket}/r/.lock", b"of another")
    with pytest.raises(LostLockError):
        lock.check()
    lock.release()
    remove(f"{bucket}/r/.lock")
    taken, barrier = [], threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        with contextlib.suppress(InUseError):
            taken.append(Lock(f"{bucket}/r/.lock", "r", "wait"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(taken) == 1
    taken[0].release()
    assert not exists(f"{bucket}/r")


def test_problems_of_a_bucket_are_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_gcs() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

        def refused(url: str = "gs://bucket/a") -> str:
            monkeypatch.setattr(buckets, "_stores", {})
            began = time.monotonic()
            with pytest.raises(UserError) as raised:
                write_atomic(url, b"")
            assert time.monotonic() - began < 10
            assert "\n" not in str(raised.value)
            return str(raised.value)

        server.statuses = [403] * 50
        assert re.fullmatch(r"gs://bucket may not be used \(.*\); check the credentials", refused())
        server.statuses = [503] * 50
        assert "gs://bucket does not answer after several attempts" in refused()
        server.statuses = []
        server.absent_buckets = {"nobody"}
        assert "gs://nobody" in refused("gs://nobody/a")
        assert "names no bucket; give gs://BUCKET/NAME" in refused("gs:///a")
        server.statuses = [503, 429, 500]
        monkeypatch.setattr(buckets, "_stores", {})
        write_atomic("gs://bucket/a", b"1")
        server.statuses = [503, 503, 429]
        assert read_bytes("gs://bucket/a") == b"1"


def refusal(url: str, tmp_path: Path, **environment: str) -> list[str]:
    """Return what `lit-fast info URL` prints where the environment holds no credentials."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    nobody = {
        "HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{port}", "GCE_METADATA_ROOT": f"127.0.0.1:{port}",
    }  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lit_fast", "info", url],
        env=nobody | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - began < 25  # 10 without other load
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr.splitlines()


def test_bucket_without_credentials_is_one_line(tmp_path: Path) -> None:
    (line,) = refusal("s3://bucket/d", tmp_path)
    assert line.startswith("lit-fast: error: s3://bucket may not be used: there are no credentials; set AWS_")
    with running_gcs() as server:
        server.fault = lambda method, path: 401
        *others, line = refusal("gs://bucket/d", tmp_path, TENSORSTORE_GCS_HTTP_URL=server.url)
        assert line.startswith("lit-fast: error: gs://bucket may not be used (")
        assert len(others) == 1  # of TensorStore
        assert "gcloud auth application-default login" in others[0]


def test_bucket_whose_server_or_credentials_do_not_answer_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        server = {"TENSORSTORE_GCS_HTTP_URL": f"http://{url}", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token"}
        with ThreadPoolExecutor() as pool:
            outputs = pool.map(
                lambda variables: refusal("gs://bucket/d", tmp_path, **variables),
                (server, {"GCE_METADATA_ROOT": url}),
            )
        for *_, line in outputs:
            assert line == (
                "lit-fast: error: gs://bucket does not answer within 8 s; check the network and the credentials"
            )


@pytest.mark.parametrize("url", ["gs://b/d", "gs://UPPER/d", "s3://b/d", "gs://bad_/d", "s3://-/d"])
def test_bucket_of_an_invalid_name_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(UserError, match=r"has an invalid name \(.*; check the name of the bucket$"):
        read_bytes(url)


def test_connection_that_stalls_is_given_up_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import time; from tests.gcs import running_gcs\n"
        "with running_gcs() as server:\n"
        "    import os; os.environ.update(server.environment)\n"
        "    from lit_fast.storage.atomic import write_atomic\n"
        "    from lit_fast.storage.files import read_bytes\n"
        "    write_atomic('gs://bucket/a', b'1')\n"
        "    stalls = [10]\n"
        "    server.fault = lambda method, path: time.sleep(stalls.pop()) or 0 if stalls else 0\n"
        "    began = time.monotonic(); assert read_bytes('gs://bucket/a') == b'1'\n"
        "    assert 1 < time.monotonic() - began < 9\n"
    )
    monkeypatch.setenv("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "1")
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
