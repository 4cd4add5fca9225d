"""Locks: one holder, abandoned ones are taken over by one process, a lost one is noticed."""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lit_fast.storage.lock as lock_module
from lit_fast.errors import UserError
from lit_fast.storage import lease_file
from lit_fast.storage.holder import Holder
from lit_fast.storage.lock import InUseError, Lock, check_unlocked, is_locked

HOLD = (
    "import sys, time; from lit_fast.storage.lock import Lock\n"
    "lock = Lock(sys.argv[1], 'D', 'stop it')\n"
    "print('held', flush=True); sys.stdin.readline()\n"
)


def take(path: Path, **options: float) -> Lock:
    return Lock(path, "D", "choose another --out", **options)


@contextmanager
def holder_process(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "TOUCH_SECONDS", 0.02)
    monkeypatch.setattr(lock_module, "ABANDONED_SECONDS", 0.3)


def elsewhere(**values: object) -> bytes:
    """What a process of another machine writes."""
    known = {"host": "far", "kernel": "another/1/2", "command": "lit-fast index"} | values
    return dataclasses.replace(Holder.this_process(), **known).encode()


def test_lock_is_held_by_one_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    assert not is_locked(path)
    with take(path) as lock:
        assert is_locked(path)
        lock.check()
        for refused in (take, lambda path: check_unlocked([path], "D", "choose another --out")):
            with pytest.raises(InUseError) as error:
                refused(path)
            where = rf"\(process {os.getpid()} on {socket.gethostname()}, since 20..-..-.. ..:..\)"
            error.match(rf"^D is being written by `.*` {where}; wait for it or choose another --out$")
    assert list(tmp_path.iterdir()) == []  # also the directory that it made
    check_unlocked([path], "D", "")
    take(path).release()


def test_lock_waits_for_its_holder(tmp_path: Path) -> None:
    first = take(tmp_path / "l")
    threading.Timer(0.1, first.release).start()
    take(tmp_path / "l", wait=10).release()


def test_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "l"
    with holder_process(path) as process:
        with pytest.raises(InUseError, match=rf"`python` \(process {process.pid} on"):
            take(path)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(InUseError):
            take(path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is left as a zombie
        assert not is_locked(path)
        start = time.monotonic()
        take(path)
        assert time.monotonic() - start < 1
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


@pytest.mark.parametrize("change", [{"start": 7}, {"token": "0"}, {"pid": 2**30}, {"pid": 2**70}])
def test_lock_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path: Path, change: dict[str, int]) -> None:
    """Its id now belongs to a process of another start time, or to one that replaced itself, or to none."""
    (tmp_path / "l").write_bytes(dataclasses.replace(Holder.this_process(), **change).encode())
    with take(tmp_path / "l") as lock:
        lock.check()


@pytest.mark.parametrize("data", [elsewhere(), elsewhere(kernel="", start=0), b"", b"[]", b"\xff{", b"{}"])
def test_lock_without_a_sign_of_its_holder_is_taken_over_after_a_while(
    tmp_path: Path, data: bytes, hurry: None
) -> None:
    (tmp_path / "l").write_bytes(data)
    assert is_locked(tmp_path / "l")
    start = time.monotonic()
    with take(tmp_path / "l"):
        assert 0.3 < time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data", [elsewhere(), b"", dataclasses.replace(Holder.this_process(), token="0").encode()]
)
def test_check_unlocked_deletes_an_abandoned_lock(tmp_path: Path, data: bytes, hurry: None) -> None:
    """Otherwise each command that only checks it would wait for a sign of its holder again."""
    (tmp_path / "l").write_bytes(data)
    check_unlocked([tmp_path / "l"], "D", "")
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_living_process_elsewhere_is_not_taken_over(
    tmp_path: Path, hurry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_fast.storage.holder._kernel", partial(secrets.token_hex, 8))
    with take(tmp_path / "l"):
        time.sleep(0.1)
        for function in (take, lambda path: check_unlocked([tmp_path / "absent", path], "D", "")):
            with pytest.raises(InUseError, match="process"):
                function(tmp_path / "l")


def test_lost_lock_is_noticed_and_left_to_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "l"
    lock = take(path)
    path.write_bytes(elsewhere())
    with pytest.raises(
        UserError, match=r"D was taken over by `lit-fast index` \(process .* on far, .*; rerun"
    ):
        lock.check()
    lock.release()
    assert path.exists()
    path.unlink()
    with pytest.raises(UserError, match=r"l was deleted, so that others may write D; rerun"):
        lock.check()
    lock.release()


STALE = st.sampled_from(["gone", "elsewhere", "empty"])


@settings(max_examples=20, deadline=None)
@given(takers=st.integers(2, 8), kind=STALE, claim=st.sampled_from([None, "gone", "elsewhere"]))
def test_abandoned_lock_is_taken_over_by_exactly_one(takers: int, kind: str, claim: str | None) -> None:
    """Also where a process was killed while it took the lock over."""
    contents = {
        "gone": dataclasses.replace(Holder.this_process(), start=7).encode(),
        "elsewhere": elsewhere(),
        "empty": b"",
    }
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(lock_module, "ABANDONED_SECONDS", 0.1)
        path = Path(directory) / "l"
        path.write_bytes(contents[kind])
        if claim:
            Path(lease_file._claim(str(path), contents[kind])).write_bytes(contents[claim])
        ready, outcomes = threading.Barrier(takers), []

        def compete() -> None:
            ready.wait()
            try:
                outcomes.append(take(path))
            except InUseError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=compete) for _ in range(takers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [o for o in outcomes if isinstance(o, Lock)]
        assert len(outcomes) == takers
        winner.check()
        winner.release()
        assert os.listdir(directory) == []


def test_of_competing_processes_one_takes_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from lit_fast.storage.lock import InUseError, Lock\n"
        "print('ready', flush=True)\n"
        "locks = []\n"
        "for path in sys.stdin:\n"
        "    try: locks.append(Lock(path.strip(), 'D', 'x')); print('won', flush=True)\n"
        "    except InUseError: print('refused', flush=True)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(3)
    ]
    try:
        assert [p.stdout.readline() for p in processes] == ["ready\n"] * 3
        for number in range(30):
            path = tmp_path / f"{number}"
            if number % 2:
                path.write_bytes(dataclasses.replace(Holder.this_process(), start=7).encode())
            for process in processes:
                process.stdin.write(f"{path}\n")
            outcomes = sorted(process.stdout.readline() for process in processes)
            assert outcomes == ["refused\n", "refused\n", "won\n"], number
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_lock_where_nothing_can_be_written_raises_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.* cannot be written: .*; fix the cause"):
        take(tmp_path / "file" / "l")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("directory", "pipe", "link"):
        with pytest.raises(UserError, match=f"{name} cannot be written: .*; fix the cause"):
            take(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} cannot be read: .*; delete it"):
            check_unlocked([tmp_path / name], "D", "")
    # A limit of the size of files fails as a full disk does.
    code = (
        "import resource, sys; from lit_fast.storage.lock import Lock; from lit_fast.errors import UserError\n"
        "held = Lock(sys.argv[1], 'D', 'x'); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); held.release()\n"
        "try: Lock(sys.argv[1], 'D', 'x')\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "full"], capture_output=True, text=True, check=True
    )
    assert f"{tmp_path}/full cannot be written: File too large; fix the cause" in done.stdout
    assert not list(tmp_path.glob("*full*"))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_forked_process_does_not_release_the_lock(tmp_path: Path) -> None:
    with take(tmp_path / "l") as lock:
        child = os.fork()
        if child == 0:
            lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        lock.check()


@given(
    st.binary(max_size=300)
    | st.builds(lambda **v: elsewhere(**v), host=st.text(), command=st.text(), since=st.integers())
)
def test_holder_of_any_content_is_described_in_one_line(data: bytes) -> None:
    holder = Holder.decode(data)
    assert holder is None or str(holder).isprintable()
