"""Embedding into a bucket: machines are killed with their disks, others end with the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from pathlib import Path

from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features
from lit_fast.embed.extract import embed_dataset
from lit_fast.storage.files import exists
from tests.buckets import bucket  # noqa: F401
from tests.e2e.machines import Machine, directory_of, kill_at_random, put
from tests.embed.contents import tree
from tests.embed.test_extract import many

SMALL_SHARDS = "import lit_fast.data.dataset\nlit_fast.data.dataset.SHARD = 1024\n"


def test_embed_killed_with_its_machine_ends_with_the_same_bytes_on_another(
    bucket: str,  # noqa: F811
    tmp_path: Path,
    tiny_vit: Path,
    small_shards: None,
) -> None:
    """LIT_FAST_KILLS machines are killed."""
    dataset, url = many(tmp_path), f"{bucket}/d"
    put(Path(dataset.path), url)
    embed_dataset(dataset.path, str(tiny_vit), name="f", batch_size=2)
    began = time.monotonic()

    def start(number: int | str) -> tuple[Machine, subprocess.Popen[str]]:
        machine = Machine(tmp_path, f"machine {number}", SMALL_SHARDS)
        return machine, machine.start("embed", url, "--tower", tiny_vit, "--name", "f", "--batch-size", 2)

    machine, process = start(0)
    kill_at_random(machine, process, f"{url}/features/f/manifest/00000.json", 0.5)
    seconds = time.monotonic() - began
    for number in range(1, int(os.environ.get("LIT_FAST_KILLS", "1"))):
        machine, process = start(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.2 * seconds * random.random())
        machine.destroy(process)
    _, process = start("last")
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert open_features(open_dataset(url), "f").finished() == [0, 1, 2]
    assert tree(directory_of(f"{url}/features/f", tmp_path / "copy")) == tree(
        Path(dataset.path) / "features" / "f"
    )
    assert not exists(f"{url}/features/f/partial")
