"""`embed`: right features, no lost rows, and the same bytes after any number of kills."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import lit_fast.embed.shard_writer
from lit_fast.cli.main import main
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import Features, open_features
from lit_fast.data.images.decode import decode
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.index import index_dataset
from lit_fast.embed.journal import Journal
from lit_fast.errors import UserError
from lit_fast.towers.tower import load_tower
from tests.embed.contents import keys, tree
from tests.helpers import encoded, picture, samples, tiny_vit_arrays, write_tar
from tests.torch_packages import import_package

# The commands with shards of 1024 rows, so that a small dataset has several.
SMALL_SHARDS = (
    "import sys, lit_fast.data.dataset as d\n"
    "d.SHARD = 1024\n"
    "from lit_fast.cli.main import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """30 rows in two tars, two of them undecodable."""
    write_tar(tmp_path / "0.tar", samples(20))
    bad = [
        ("broken.jpg", encoded(picture(0))[:300]),
        ("broken.txt", b"x"),
        ("tiff.png", b"II*\x00"),
        ("tiff.txt", b"x"),
    ]
    write_tar(tmp_path / "1.tar", samples(8, first=20) + bad)
    return index_dataset([f"{tmp_path}/?.tar"], tmp_path / "d", seed=0)


def many(tmp_path: Path) -> Dataset:
    """2500 rows: three small shards."""
    members = []
    files = [encoded(picture(i, 40, 36)) for i in range(64)]
    for i in range(2500):
        members += [(f"{i}.jpg", files[i % 64] if i % 700 else b"no image"), (f"{i}.cls", b"0")]
    write_tar(tmp_path / "many.tar", members)
    return index_dataset([f"{tmp_path}/many.tar"], tmp_path / "d", seed=0)


def bad_rows(dataset: Dataset) -> list[int]:
    """The rows of `many` without an image, in order."""
    return [row for row, key in enumerate(keys(dataset)) if int(key) % 700 == 0]


def test_embed_stores_the_features_of_the_tower(
    dataset: Dataset, tiny_vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row by row, against one image at a time on one device."""
    embed_dataset(dataset.path, str(tiny_vit), batch_size=7, workers=3, dtype="float32")
    features = open_features(dataset)
    got = features.read_all().astype(np.float32)
    tower = load_tower(str(tiny_vit))
    run = jax.jit(lambda image: tower.embed(tower.params, image[None], jax.numpy.float32)[0])
    [block] = dataset.iter_blocks()
    for row, key in enumerate(block.keys):
        if key in ("broken", "tiff"):
            assert not got[row].any()
            continue
        image = tower.preprocess.apply(decode(encoded(picture(int(key)))))
        np.testing.assert_allclose(got[row], run(image), rtol=2**-7, atol=1e-3)
    broken, tiff = block.keys.index("broken"), block.keys.index("tiff")
    invalid = features.invalid_rows()
    assert set(invalid) == {broken, tiff}
    assert invalid[tiff].startswith("not a JPEG")
    assert invalid[broken] == "damaged image: Truncated File Read"
    out = capsys.readouterr().out
    assert f"embedded 30 rows with tiny into {features.path}: 28 valid, 2 invalid, " in out
    assert f"tiff in 1.tar: {invalid[tiff]}" in out
    assert sorted(p.name for p in Path(features.path).iterdir()) == [
        "c",
        "manifest",
        "tower.json",
        "zarr.json",
    ]


def test_embed_of_shares_equals_embed_of_all_shards(
    tmp_path: Path, tiny_vit: Path, small_shards: None, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = many(tmp_path)
    assert dataset.shards == 3
    embed_dataset(dataset.path, str(tiny_vit), name="one", batch_size=96)
    embed_dataset(dataset.path, str(tiny_vit), name="two", batch_size=96, share=(1, 2))
    two = open_features(dataset, "two")
    assert two.finished() == [1]
    with pytest.raises(UserError, match="2 of 3 shards are missing"):
        two.invalid_rows()
    embed_dataset(dataset.path, str(tiny_vit), name="two", batch_size=96, share=(0, 2))
    root = Path(dataset.path) / "features"
    assert tree(root / "one") == tree(root / "two")
    assert list(open_features(dataset, "one").invalid_rows()) == bad_rows(dataset)
    capsys.readouterr()
    embed_dataset(dataset.path, str(tiny_vit), name="one", batch_size=8)
    assert "is complete: 2,500 rows, 2,496 valid, 4 invalid" in capsys.readouterr().out


def test_embed_dataset_frees_the_features_of_finished_shards(
    tmp_path: Path, tiny_vit: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Journal]] = []
    most = 0

    class CountedJournal(Journal):
        def __init__(self, *args: Any) -> None:
            nonlocal most
            super().__init__(*args)
            alive.append(weakref.ref(self))
            gc.collect()
            most = max(most, sum(journal() is not None for journal in alive))

    monkeypatch.setattr(lit_fast.embed.shard_writer, "Journal", CountedJournal)
    write_tar(tmp_path / "0.tar", [(f"{i}.{s}", b"x") for i in range(6000) for s in ("jpg", "txt")])
    dataset = index_dataset([f"{tmp_path}/0.tar"], tmp_path / "d", seed=0)
    with pytest.raises(UserError, match="none of the 6,000 images could be embedded"):
        embed_dataset(dataset.path, str(tiny_vit), batch_size=64)
    assert len(alive) == dataset.shards == 6
    assert most <= 3  # the reader is ahead of the writer


def start(dataset: Path, tower: Path, name: str) -> subprocess.Popen[bytes]:
    arguments = ["embed", str(dataset), "--tower", str(tower), "--name", name, "--batch-size", "2"]
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_SHARDS, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_embed_killed_anywhere_ends_with_the_same_bytes(
    tmp_path: Path, tiny_vit: Path, small_shards: None
) -> None:
    dataset = many(tmp_path)
    embed_dataset(dataset.path, str(tiny_vit), name="whole", batch_size=2)
    killed = Path(dataset.path) / "features" / "killed"
    rng = random.Random(0)
    done = 0
    for number, kind in enumerate(
        [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    ):
        process = start(dataset.path, tiny_vit, "killed")
        # Rows; more than there are already, so that the process is at work when the signal comes.
        goal = max((number + rng.random()) * 400, progress_of(killed) + 1)
        while process.poll() is None and progress_of(killed) < goal:
            time.sleep(0.001)
        process.send_signal(kind)
        process.communicate()
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(kind, -kind)
        assert progress_of(killed) >= max(done, goal)  # no finished batch is lost
        done = progress_of(killed)
    with open(next((killed / "partial").iterdir()), "ab") as file:
        file.write(b"LFJ1 half a record")
    (killed / "c" / "0").mkdir(parents=True, exist_ok=True)
    (killed / "c" / "0" / "0.__lock").write_bytes(b"stale")
    (killed / "manifest").mkdir(exist_ok=True)
    (killed / "manifest" / ".00000.json.1.tmp").write_bytes(b"stale")
    process = start(dataset.path, tiny_vit, "killed")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert b"2,496 valid, 4 invalid" in out
    assert tree(killed) == tree(Path(dataset.path) / "features" / "whole")
    assert not (killed / "partial").exists()


def progress_of(path: Path) -> int:
    """Rows that are finished or in journals of batches of 8 rows x 32 bfloat16."""
    finished = {p.stem for p in (path / "manifest").glob("0*.json")}
    # A journal outlives the manifest by a moment, and may vanish while it is looked at.
    rows = 1024 * len(finished)
    for journal in (path / "partial").glob("*"):
        if journal.stem not in finished and journal.exists():
            rows += journal.stat().st_size // (8 * 32 * 2 + 26) * 8
    return rows


def test_embed_killed_while_a_shard_is_finished_ends_with_the_same_bytes(
    tmp_path: Path, tiny_vit: Path, small_shards: None
) -> None:
    """Journal but no data; data but no manifest; manifest and still a journal: the end is the same."""
    dataset = many(tmp_path)
    embed_dataset(dataset.path, str(tiny_vit), batch_size=8)
    features = open_features(dataset)
    whole = tree(features.path)
    data = features.read_all()
    invalid = features.manifest(1).invalid
    belongs = {
        "identity": features.identity,
        "keys": dataset.shard_keys[1],
        "batch_size": 8,
        "max_pixels": 64_000_000,
    }
    with closing(Journal(Path(features.path) / "partial" / "00001.journal", 1024, 32, belongs)) as journal:
        for lo in range(0, 1024, 8):
            rows = {r - 1024: why for r, why in invalid.items() if lo <= r - 1024 < lo + 8}
            journal.append(data[1024 + lo : 1032 + lo], rows)
    Path(features.manifest_path(1)).unlink()
    (Path(features.path) / "c" / "1" / "0").unlink()
    Path(features.manifest_path(2)).unlink()
    (Path(features.path) / "partial" / "00000.journal").write_bytes(b"of a finished shard")
    embed_dataset(dataset.path, str(tiny_vit), batch_size=8)
    assert tree(features.path) == whole


def test_embed_of_another_tower_needs_another_name(dataset: Dataset, tiny_vit: Path) -> None:
    embed_dataset(dataset.path, str(tiny_vit), name="t", dtype="float32")
    before = tree(dataset.path)
    with pytest.raises(UserError, match=r"another tower \(other preprocess\); choose another --name"):
        embed_dataset(dataset.path, str(tiny_vit), name="t", preprocess="tf-squash")
    with pytest.raises(UserError, match=r"other dtype"):
        embed_dataset(dataset.path, str(tiny_vit), name="t", dtype="bfloat16")
    with pytest.raises(UserError, match="cannot be the name of a directory"):
        embed_dataset(dataset.path, str(tiny_vit), name="../t")
    assert tree(dataset.path) == before
    embed_dataset(dataset.path, str(tiny_vit), name="t2", preprocess="tf-squash", dtype="bfloat16")
    one, two = (open_features(dataset, n).read_all().astype(np.float32) for n in ("t", "t2"))
    assert not np.allclose(one, two, atol=0.05)


def test_embed_with_missing_or_changed_sources_names_them_before_any_work(
    dataset: Dataset, tiny_vit: Path
) -> None:
    source = Path(dataset.sources[1].path)
    data = source.read_bytes()
    source.write_bytes(data[:-512])
    with pytest.raises(UserError, match=rf"{source} has {len(data) - 512} bytes"):
        embed_dataset(dataset.path, str(tiny_vit))
    source.unlink()
    with pytest.raises(UserError, match=rf"{source} .*No such file"):
        embed_dataset(dataset.path, str(tiny_vit))
    assert not (Path(dataset.path) / "features").exists()


def test_embed_marks_non_finite_features_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tower whose activations overflow on a white image and not on a grey one."""
    arrays = tiny_vit_arrays()
    arrays["embedding/kernel"] *= 0
    arrays["embedding/kernel"][..., 0, :] = 1e36
    np.savez(tmp_path / "wild.npz", **arrays)
    grey = Image.new("RGB", (32, 32), (127, 127, 127))
    rows = [("bad", Image.new("RGB", (32, 32), "white")), ("good", grey)]
    members = [m for k, im in rows for m in ((f"{k}.png", encoded(im, "PNG")), (f"{k}.cls", b"0"))]
    write_tar(tmp_path / "0.tar", members)
    dataset = index_dataset([f"{tmp_path}/0.tar"], tmp_path / "d", seed=0)
    embed_dataset(dataset.path, str(tmp_path / "wild.npz"))
    features = open_features(dataset)
    [block] = dataset.iter_blocks()
    bad = block.keys.index("bad")
    assert features.invalid_rows() == {bad: "non-finite feature"}
    stored = features.read_all().astype(np.float32)
    assert not stored[bad].any()
    assert stored[1 - bad].any()
    assert "bad in 0.tar: non-finite feature" in capsys.readouterr().out


def test_embed_without_one_usable_image_is_an_error(tmp_path: Path, tiny_vit: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.txt", b"text")])
    dataset = index_dataset([f"{tmp_path}/0.tar"], tmp_path / "d", seed=0)
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 1 images could be embedded"):
            embed_dataset(dataset.path, str(tiny_vit))


def test_max_pixels(dataset: Dataset, tiny_vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="none of the 30 images"):
        embed_dataset(dataset.path, str(tiny_vit), max_pixels=1000)


def test_embed_on_a_full_disk_is_one_line_and_continues_later(
    dataset: Dataset, tiny_vit: Path, tmp_path: Path
) -> None:
    """A limit on the size of files simulates a full disk: writes fail with an OSError."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
        "from lit_fast.cli.main import main\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    command = ["embed", str(dataset.path), "--tower", str(tiny_vit)]
    # 1500 bytes: in the journal; 2500: in the array.
    for limit in ("1500", "2500"):
        done = subprocess.run([sys.executable, "-c", script, limit, *command], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "File too large" in done.stderr
        assert "rerun the same command" in done.stderr
        assert "Traceback" not in done.stderr
    assert main(command) == 0
    assert set(open_features(dataset).invalid_rows().values()) != set()


def test_command_line(
    dataset: Dataset, tiny_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["embed", str(dataset.path), "--tower", str(tiny_vit)]
    assert main([*command, "--shard-of", "2/2"]) == 2
    assert main([*command, "--batch-size", "0"]) == 2
    assert main(["embed", str(tmp_path / "no"), "--tower", str(tiny_vit)]) == 2
    assert main(["embed", str(dataset.path), "--tower", str(tmp_path / "no.npz")]) == 2
    assert capsys.readouterr().err.count("\n") == 4
    assert not (Path(dataset.path) / "features").exists()
    assert main([*command, "--name", "x", "--batch-size", "5"]) == 0


def test_unwritable_directory(dataset: Dataset, tiny_vit: Path) -> None:
    if os.geteuid() == 0:
        (Path(dataset.path) / "features").write_text("a file where the directory should be")
    else:
        (Path(dataset.path) / "features").mkdir(mode=0o500)
    with pytest.raises(UserError, match="fix the cause, then rerun the same command"):
        embed_dataset(dataset.path, str(tiny_vit))


def test_stored_features_equal_timms_on_real_photos(realdata: Path, tmp_path: Path) -> None:
    """From a tar to the store (decode, crop, ViT) with pretrained weights; timm is the reference."""
    timm = import_package("timm")
    import torch

    weights = realdata / "vit" / "Ti_16-augreg-i21k-i1k-224.npz"
    source = open_dataset(index_dataset([str(realdata / "wds_tf_flowers")], tmp_path / "all", seed=0).path)
    [block] = source.iter_blocks()
    with open(source.sources[0].path, "rb") as file:
        files = [
            (file.seek(o), file.read(s))[1] for o, s in zip(block.offsets[:6], block.sizes[:6], strict=True)
        ]
    write_tar(
        tmp_path / "0.tar", [m for i, d in enumerate(files) for m in ((f"{i}.jpg", d), (f"{i}.cls", b"0"))]
    )
    dataset = index_dataset([f"{tmp_path}/0.tar"], tmp_path / "d", seed=0)
    embed_dataset(dataset.path, str(weights), batch_size=4, dtype="float32")
    got = Features.read_all(open_features(dataset)).astype(np.float32)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000).eval()
    model.load_pretrained(str(weights))
    preprocess = load_tower(str(weights)).preprocess
    [block] = dataset.iter_blocks()
    pixels = np.stack([preprocess.apply(decode(files[int(key)])) for key in block.keys])
    x = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    with torch.no_grad():
        want = model.forward_features(x)[:, 0].numpy()
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=2e-3)
