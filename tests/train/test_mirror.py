"""The local copy of a run in a bucket: what reaches the bucket, in which order, and what happens where writes fail."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_fast.storage.lock as lock_module
from lit_fast.errors import UserError
from lit_fast.runs.remote_checkpoints import cached_checkpoint, stored_steps
from lit_fast.storage import buckets
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import list_names, read_bytes, remove, walk_files
from lit_fast.storage.lock import Lock
from lit_fast.train.mirror import RunMirror
from tests.gcs import CUT, FakeGcs, running_gcs

RUN = "gs://bucket/r"
SIZES = (0, 1, 5000, 300_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGcs]:
    monkeypatch.setattr(buckets, "_stores", {})
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    with running_gcs() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def lock() -> Lock:
    return Lock(f"{RUN}/.lock", f"workdir {RUN}", "choose another --workdir")


def train(mirror: RunMirror, step: int, seed: int = 0) -> None:
    """Write metrics and a checkpoint as a training does."""
    local, rng = Path(mirror.local), random.Random(step + seed)
    (local / "config.toml").write_text("steps = 100")
    with open(local / "metrics.jsonl", "a") as file:
        file.write(f"{step}\n")
    temporary = local / "checkpoints" / f"{step}.tmp"
    for number, size in enumerate(SIZES):
        path = temporary / ("params" if number else "meta") / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
    temporary.rename(local / "checkpoints" / str(step))


def content(mirror: RunMirror, step: int) -> list[bytes]:
    assert mirror.fetch(step)
    directory = Path(mirror.local) / "checkpoints" / str(step)
    return [path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()]


def expected(step: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(step + seed)
    return [rng.randbytes(size) for size in SIZES]


def forget(mirror: RunMirror) -> None:
    """Delete the disk of the machine."""
    shutil.rmtree(mirror.local)


def test_mirror_brings_a_run_to_another_machine(server: FakeGcs) -> None:
    with lock() as held, RunMirror(RUN, held) as mirror:
        for step in (20, 40, 60):
            train(mirror, step)
            mirror.check()
        shutil.rmtree(Path(mirror.local) / "checkpoints" / "20")
        (Path(mirror.local) / "damaged" / "1").mkdir(parents=True)
        (Path(mirror.local) / "damaged" / "1" / "a").touch()
        (Path(mirror.local) / ".hidden").touch()
    assert stored_steps(RUN) == [40, 60]
    assert not any("/20" in name or "damaged" in name or "/." in name for name in server.objects)
    forget(mirror)
    sent = len(server.requests)
    with lock() as held, RunMirror(RUN, held) as mirror:
        assert (Path(mirror.local) / "metrics.jsonl").read_text() == "20\n40\n60\n"
        # Only the newest is needed; of the others Orbax reads the metrics.
        fetched = [path for _, path, _ in server.requests[sent:] if "params" in path and "alt=media" in path]
        assert fetched == []
        assert content(mirror, 60) == expected(60)
        assert content(mirror, 40) == expected(40)
    assert stored_steps(RUN) == [40, 60]


def test_mirror_without_a_lock_writes_nothing(server: FakeGcs) -> None:
    with lock() as held, RunMirror(RUN, held) as mirror:
        train(mirror, 20)
    before = dict(server.objects)
    with RunMirror(RUN, None) as mirror:
        assert (Path(mirror.local) / "metrics.jsonl").read_text() == "20\n"
        assert list_names(f"{mirror.local}/checkpoints") == []
        (Path(mirror.local) / "new").touch()
        mirror.check()
    assert server.objects == before


@pytest.mark.parametrize("status", [429, 500, 503, CUT])
def test_mirror_survives_faults_that_pass(server: FakeGcs, status: int) -> None:
    rng = random.Random(status)
    with lock() as held, RunMirror(RUN, held) as mirror:
        server.fault = lambda method, path: status if rng.random() < 0.15 else 0
        for step in (20, 40):
            train(mirror, step)
            mirror.check()
    forget(mirror)
    with lock() as held, RunMirror(RUN, held) as mirror:
        assert content(mirror, 40) == expected(40)
        assert (Path(mirror.local) / "metrics.jsonl").read_text() == "20\n40\n"
    server.fault = lambda method, path: 0
    assert stored_steps(RUN) == [20, 40]


def test_mirror_survives_slow_answers(server: FakeGcs) -> None:
    server.latency = 0.05
    with lock() as held, RunMirror(RUN, held) as mirror:
        train(mirror, 20)
    forget(mirror)
    with lock() as held, RunMirror(RUN, held) as mirror:
        assert content(mirror, 20) == expected(20)


def test_unwritable_bucket_is_one_line_and_the_local_state_is_continued(server: FakeGcs) -> None:
    with lock() as held:
        mirror = RunMirror(RUN, held)
        train(mirror, 20)
        mirror.check()
        server.fault = lambda method, path: 403 if method != "GET" else 0
        train(mirror, 40)
        mirror.check()
        assert mirror.has_failed
        train(mirror, 60)
        mirror.check()
        with pytest.raises(UserError) as raised:
            mirror.push()
        assert "\n" not in str(raised.value)
        raised.match("^gs://bucket/.* may not be used .*; fix the cause, then rerun")
        assert f"continue from what is in {mirror.local}" in str(raised.value)
        assert stored_steps(RUN) == [20]
        server.fault = lambda method, path: 0
        with RunMirror(RUN, held) as mirror:
            assert stored_steps(RUN) == [20, 40, 60]
            assert [content(mirror, step) for step in (20, 40, 60)] == [expected(s) for s in (20, 40, 60)]


def test_local_state_of_another_run_is_not_continued(server: FakeGcs) -> None:
    with lock() as held:
        with RunMirror(RUN, held) as mirror:
            train(mirror, 20)
        write_atomic(f"{RUN}/config.toml", b"steps = 90")
        remove(f"{RUN}/checkpoints/20.json")
        with RunMirror(RUN, held) as mirror:
            assert list_names(f"{mirror.local}/checkpoints") == []
        assert not any("checkpoints" in name for name in server.objects)  # parts without .json are deleted


def test_local_state_behind_the_bucket_is_replaced(
    server: FakeGcs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with lock() as held:
        with RunMirror(RUN, held) as first:
            train(first, 20)
        monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "other"))
        with RunMirror(RUN, held) as second:
            train(second, 40)
        monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
        with RunMirror(RUN, held) as again:
            assert again.local == first.local
            assert content(again, 40) == expected(40)
    assert stored_steps(RUN) == [20, 40]


def test_lost_lock_stops_all_writes(server: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between the files of a checkpoint, after the process was suspended there."""
    monkeypatch.setattr(lock_module, "TOUCH_SECONDS", 1000.0)
    clock, jump = lock_module._clock, [0.0]
    monkeypatch.setattr(lock_module, "_clock", lambda: clock() + jump[0])
    held, writes = lock(), []
    mirror = RunMirror(RUN, held)
    train(mirror, 20)

    def fault(method: str, path: str) -> int:
        if method == "POST" and "checkpoints" in path:
            writes.append(path)
            if len(writes) == 1:  # the machine is suspended, another one takes over and writes
                jump[0] = 61.0
                with server.lock:
                    server.generation += 1
                    server.objects["bucket/r/.lock"] = b"another", server.generation
        return 0

    server.fault = fault
    monkeypatch.setattr("lit_fast.runs.remote_checkpoints.in_threads", one_by_one)
    mirror.check()
    assert mirror.has_failed
    before = dict(server.objects)
    train(mirror, 40)
    with pytest.raises(UserError, match=r"workdir gs://bucket/r was taken over by another process, because"):
        mirror.push()
    held.release()
    assert len(writes) == 1
    assert server.objects == before
    assert stored_steps(RUN) == []


def one_by_one(work, items, threads=1):
    return [work(item) for item in items]


@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
def test_damaged_checkpoint_of_the_bucket_is_not_used(
    server: FakeGcs, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock() as held:
        with RunMirror(RUN, held) as mirror:
            train(mirror, 20)
            train(mirror, 40)
        url = f"{RUN}/checkpoints/40/params/3"
        data = read_bytes(url)
        if damage == "missing":
            remove(url)
        else:
            write_atomic(url, data[:1000] if damage == "shorter" else data[:-1] + b"\0")
        forget(mirror)
        with RunMirror(RUN, held) as mirror:
            assert not mirror.fetch(40)
            assert (
                "warning: checkpoint gs://bucket/r/checkpoints/40 is damaged: params/3"
                in capsys.readouterr().err
            )
            assert content(mirror, 20) == expected(20)
            shutil.rmtree(f"{mirror.local}/checkpoints/40")  # as `restore_last` does
        assert stored_steps(RUN) == [20]
        assert not [name for name in walk_files(f"{RUN}/checkpoints") if name.startswith("40")]


def test_checkpoint_that_is_deleted_while_it_is_written_is_skipped(
    server: FakeGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock() as held, RunMirror(RUN, held) as mirror:
        train(mirror, 20)
        monkeypatch.setattr("lit_fast.runs.remote_checkpoints.in_threads", one_by_one)

        def fault(method: str, path: str) -> int:
            if method == "POST" and "checkpoints%2F20" in path:
                shutil.rmtree(f"{mirror.local}/checkpoints/20", ignore_errors=True)
            return 0

        server.fault = fault
        train(mirror, 40)
        mirror.check()
        assert not mirror.has_failed
        assert stored_steps(RUN) == [40]
    with lock() as held, RunMirror(RUN, held) as mirror:
        assert content(mirror, 40) == expected(40)
    assert not [name for name in walk_files(f"{RUN}/checkpoints") if name.startswith("20")]


def test_reader_of_a_run_follows_its_training(server: FakeGcs) -> None:
    """The checkpoint that is being read is deleted when a newer one exists."""
    with lock() as held, RunMirror(RUN, held) as mirror:
        train(mirror, 20)
        mirror.check()

        def fault(method: str, path: str) -> int:
            if method == "GET" and "checkpoints%2F20%2Fparams" in path:
                server.fault = lambda method, path: 0
                train(mirror, 40)
                shutil.rmtree(f"{mirror.local}/checkpoints/20")
                mirror.check()
            return 0

        server.fault = fault
        step, local = cached_checkpoint(RUN, None, ("params", "meta"))
        assert step == 40
        assert Path(local, "checkpoints", "40", "params", "3").read_bytes() == expected(40)[3]
        with pytest.raises(UserError, match="has no checkpoint of step 20; choose from 40"):
            cached_checkpoint(RUN, 20, ("params", "meta"))
        remove(f"{RUN}/checkpoints/40/meta/0")
        assert cached_checkpoint(RUN, 40, ("params", "meta")) == (40, local)
        with pytest.raises(
            UserError, match=r"checkpoints/40 is damaged: meta/0 is missing; give another --step"
        ):
            cached_checkpoint(RUN, 40, ("meta",))
