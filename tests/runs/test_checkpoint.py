"""Checkpoints: what is kept, and that damage is noticed."""

import gc
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_fast.runs.checkpoint import (
    DamagedCheckpointError,
    abstract,
    digest,
    open_manager,
    restore,
    restore_last,
    save,
)
from lit_fast.storage.text_files import read_json


def trees(value):
    rng = np.random.default_rng(value)
    params = {"kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32), "bias": jnp.full((3,), value)}
    rest = {"momentum": jnp.asarray(rng.normal(size=(64, 32)), jnp.bfloat16), "step": jnp.int32(value)}
    return params, rest


def write(path, steps, **options):
    manager = open_manager(path, **options)
    for step in steps:
        save(manager, step, both(step), {"note": step}, score=-abs(step - 3.0))
    manager.wait_until_finished()
    return manager


def both(value):
    return dict(zip(("params", "rest"), trees(value), strict=True))


def read(manager, step):
    return restore(manager, step, abstract(both(0)))


def test_restore_returns_what_was_saved(tmp_path):
    manager = write(tmp_path, [5], keep=2)
    found, meta = read(manager, 5)
    jax.tree.map(np.testing.assert_array_equal, found, both(5))
    assert meta["note"] == 5


def test_manager_keeps_last_every_and_best(tmp_path):
    manager = write(tmp_path, range(1, 11), keep=2, keep_every=4, best=True)
    assert sorted(manager.all_steps()) == [3, 4, 8, 9, 10]  # 3 has the highest score


def test_digest_changes_with_any_bit():
    params, _ = trees(1)
    flat = np.asarray(params["kernel"])
    before = digest(params)
    rng = random.Random(0)
    for _ in range(50):
        changed = flat.copy()
        changed.view(np.uint32).reshape(-1)[rng.randrange(flat.size)] ^= np.uint32(1 << rng.randrange(32))
        assert digest(params | {"kernel": jnp.asarray(changed)}) != before
    swapped = flat.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert digest(params | {"kernel": jnp.asarray(swapped)}) != before


@pytest.mark.parametrize("item", ["params", "rest"])
def test_restore_last_with_flipped_bit_takes_the_previous_step(tmp_path, capsys, item):
    manager = write(tmp_path, [1, 2], keep=3)
    manager.close()
    file = max((tmp_path / "checkpoints/2" / item).rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    manager = open_manager(tmp_path, keep=3)
    with pytest.raises(DamagedCheckpointError, match="checkpoints/2"):
        read(manager, 2)
    step, found = restore_last(manager, abstract(both(0)))
    assert step == 1
    np.testing.assert_array_equal(found["params"]["kernel"], trees(1)[0]["kernel"])
    assert "continuing from the previous checkpoint" in capsys.readouterr().err
    assert list(manager.all_steps()) == [1]
    assert len(list((tmp_path / "damaged").iterdir())) == 1  # it is kept
    save(manager, 2, both(2), {"note": 2})  # and its step can be saved again
    manager.wait_until_finished()
    assert read(manager, 2)[1]["note"] == 2


def test_restore_of_many_damaged_arrays_prints_one_error(tmp_path, monkeypatch):
    """Orbax reads all arrays at once and abandons the others after the first that fails."""
    write(tmp_path, [1], keep=2).close()
    (file,) = (tmp_path / "checkpoints/1/params/array_metadatas").iterdir()
    file.write_text(file.read_text()[:100])
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.object))
    with pytest.raises(DamagedCheckpointError, match="checkpoints/1 cannot be read"):
        read(open_manager(tmp_path), 1)
    gc.collect()
    assert not printed


def test_manager_removes_incomplete_checkpoints(tmp_path):
    write(tmp_path, [1], keep=2).close()
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    manager = open_manager(tmp_path, keep=2)
    assert list(manager.all_steps()) == [1]
    deadline = time.monotonic() + 20
    while half.exists() and time.monotonic() < deadline:  # they are removed in the background
        time.sleep(0.05)
    assert not half.exists()
    manager.close()


def test_restore_last_without_checkpoints_returns_none(tmp_path):
    assert restore_last(open_manager(tmp_path, keep=2), abstract(both(0))) is None


def test_restore_without_digests_raises(tmp_path):
    manager = write(tmp_path, [1], keep=2)
    (file,) = (tmp_path / "checkpoints/1/meta").rglob("metadata")
    value = read_json(file)
    file.write_text('{"note": 1}')
    assert "digests" in value
    with pytest.raises(DamagedCheckpointError, match="differs from what was saved"):
        read(manager, 1)


def test_restore_last_fetches_steps_until_one_is_whole(tmp_path):
    manager = write(tmp_path, [1, 2, 3], keep=3)
    fetched = []

    def fetch(step):
        fetched.append(step)
        return step < 3

    step, found = restore_last(manager, abstract(both(0)), fetch)
    assert (step, fetched, list(manager.all_steps())) == (2, [3, 2], [1, 2])
    np.testing.assert_array_equal(found["params"]["kernel"], trees(2)[0]["kernel"])
