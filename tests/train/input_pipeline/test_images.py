"""Batches of pixels: the rows of the stream, with the images that embedding would see."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK, Dataset, Source, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.images.decode import MAX_PIXELS, decode
from lit_fast.data.tokens import open_tokens
from lit_fast.embed.index import index_dataset
from lit_fast.embed.tokenize import tokenize_dataset
from lit_fast.errors import UserError
from lit_fast.towers.loader import ImageLoader
from lit_fast.towers.preprocess import METHODS, Preprocess
from lit_fast.train.input_pipeline.images import Images, check_image_sources
from lit_fast.train.input_pipeline.stream import Stream, open_stream
from tests.helpers import encoded, picture, samples, write_tar
from tests.synthetic import WORDS
from tests.web import file_server

PREPROCESS = Preprocess("pil-crop", 16, 18)
CONFIG = StreamConfig(global_batch=12, captions_per_image=2)
BROKEN = ("000000007", "000000030")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two tars of 25 and 15 pictures with two captions each; two of the pictures are cut off."""
    path = tmp_path_factory.mktemp("images")
    members = [
        (name, data[: len(data) // 2] if name.removesuffix(".jpg") in BROKEN else data)
        for name, data in samples(40)
    ]
    write_tar(path / "0.tar", members[:75])
    write_tar(path / "1.tar", members[75:])
    index_dataset([str(path / "0.tar"), str(path / "1.tar")], path / "d", seed=3)
    tokenize_dataset(path / "d", train_vocab=282, name="words", max_length=8)
    return open_dataset(path / "d")


def opened(
    dataset: Dataset,
    config: StreamConfig = CONFIG,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    **options: bool,
) -> Stream:
    return open_stream(Images(dataset, PREPROCESS, **options), open_tokens(dataset), config, seed, part)


def keys_of(dataset: Dataset) -> list[str]:
    return [key for block in dataset.iter_blocks() for key in block.keys]


def embedded_pixels(dataset: Dataset, preprocess: Preprocess = PREPROCESS) -> np.ndarray:
    """What `lit-fast embed` passes to the tower, uint8 [rows, size, size, 3]."""
    loader = ImageLoader(dataset, preprocess, MAX_PIXELS)
    out = np.zeros((dataset.rows, *loader.shape), np.uint8)
    loader.load(0, dataset.rows, out)
    return out[:, 0]


def test_epoch_has_every_readable_row_once_with_the_pixels_that_embed_uses(dataset: Dataset) -> None:
    stream, want = opened(dataset), embedded_pixels(dataset)
    tokens, captions = open_tokens(dataset).tokenizer(), next(iter(dataset.iter_captions()))
    batches = [stream.batches[step] for step in range(10)]  # three epochs
    rows = np.concatenate([batch["rows"] for batch in batches])
    broken = {row for row, key in enumerate(keys_of(dataset)) if key in BROKEN}
    for epoch in np.split(rows, 3):
        counts = Counter(epoch.tolist())
        assert not broken & set(counts)
        assert sum(counts.values()) == 40
        assert len(counts) >= 36  # two rows replace the broken ones and occur twice, if they differ
        assert len(counts) <= 38
    for batch in batches:
        assert batch["pixels"].dtype == np.uint8
        np.testing.assert_array_equal(batch["pixels"], want[batch["rows"]])
        for row, ids in zip(batch["rows"], batch["ids"].reshape(12, 2, -1), strict=True):
            assert {tuple(text) for text in ids.tolist()} == {tuple(text) for text in tokens(captions[row])}
    assert set(stream.batches.pixels.unreadable) == broken
    assert all("damaged" in reason for reason in stream.batches.pixels.unreadable.values())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 2),
    steps=st.lists(st.integers(0, 2**31 - 2), min_size=1, max_size=3),
    processes=st.sampled_from([2, 3, 4, 6]),
    crop=st.booleans(),
    flip=st.booleans(),
    alignment=st.sampled_from([0.0, 0.5]),
)
def test_batch_is_a_function_of_seed_and_step_whatever_the_processes(
    dataset: Dataset,
    seed: int,
    steps: list[int],
    processes: int,
    crop: bool,
    flip: bool,
    alignment: float,
) -> None:
    config = replace(CONFIG, corrupt_alignment=alignment)
    whole = opened(dataset, config, seed, crop=crop, flip=flip).batches
    parts = [
        opened(dataset, config, seed, (p, processes), crop=crop, flip=flip).batches for p in range(processes)
    ]
    for step in steps:
        batch = whole[step]
        for key in ("pixels", "ids", "rows"):
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key])


def test_resumed_stream_yields_the_same_bytes(dataset: Dataset) -> None:
    first = opened(dataset, crop=True, flip=True)
    iterator = first.iterate(0)
    batches = [next(iterator) for _ in range(9)]
    for start in (1, 6):
        again = opened(dataset, crop=True, flip=True)
        resumed = again.iterate(start)
        for batch in batches[start : start + 3]:
            other = next(resumed)
            assert all(batch[key].tobytes() == other[key].tobytes() for key in batch)
        again.close()
    first.close()


def test_crops_and_mirrored_images_differ_from_step_to_step(dataset: Dataset) -> None:
    want = embedded_pixels(dataset)
    batches = [opened(dataset, flip=True).batches[step] for step in range(30)]
    rows = np.concatenate([batch["rows"] for batch in batches])
    pixels = np.concatenate([batch["pixels"] for batch in batches])
    mirrored = (pixels == want[rows][:, :, ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(pixels[~mirrored], want[rows[~mirrored]])
    assert 0.36 < mirrored.mean() < 0.64  # 360 draws: five standard deviations are 0.13
    batch = opened(dataset, crop=True).batches[4]
    row = batch["rows"][5]
    image = decode(dict(samples(40))[f"{keys_of(dataset)[row]}.jpg"])
    np.testing.assert_array_equal(batch["pixels"][5], PREPROCESS.view(image, f"0 4 {row}", 1))


@pytest.mark.parametrize("method", METHODS)
def test_pixels_of_every_method_are_those_of_embed(dataset: Dataset, method: str) -> None:
    preprocess = Preprocess(method, 24, 24)
    stream = open_stream(Images(dataset, preprocess), open_tokens(dataset), CONFIG, 1)
    batch = stream.batches[3]
    np.testing.assert_array_equal(batch["pixels"], embedded_pixels(dataset, preprocess)[batch["rows"]])


def test_identity_depends_on_everything_that_changes_pixels(dataset: Dataset) -> None:
    tokens, changed = open_tokens(dataset), replace(PREPROCESS, size=17)
    found = [
        open_stream(Images(dataset, preprocess, **options), tokens, CONFIG, 0).identity
        for preprocess, options in (
            (PREPROCESS, {}),
            (PREPROCESS, {"crop": True}),
            (PREPROCESS, {"flip": True}),
            (changed, {}),
        )
    ]
    assert len(set(found)) == 4
    threads = open_stream(Images(dataset, PREPROCESS, workers=7), tokens, CONFIG, 0)
    assert threads.identity == found[0]
    assert "by 7 threads" in threads.description


def test_streamed_dataset_has_its_rows_once_and_their_pixels(tmp_path: Path) -> None:
    """Blocks of 1024 rows of noise, in windows instead of an exact shuffle."""
    writer = DatasetWriter(tmp_path / "d")
    rows = 4 * BLOCK + 10
    for row in range(rows):
        writer.add(Row(str(row), 0, row, 0, (f"{WORDS[row % 15]} {WORDS[row % 13]}",)))
    writer.finish(seed=0, sources=[Source("noise:5000", 0, "noise")])
    tokenize_dataset(tmp_path / "d", train_vocab=282, name="words", max_length=4)
    dataset = open_dataset(tmp_path / "d")
    config = StreamConfig(global_batch=512, memory_gib=0.0, shuffle_streams=2, shuffle_window_blocks=1)
    images = Images(dataset, Preprocess("pil-squash", 2, 2))
    stream = open_stream(images, open_tokens(dataset), config, 0)
    assert not stream.in_memory
    batches = [stream.batches[step] for step in range(8)]
    np.testing.assert_array_equal(np.sort(np.concatenate([b["rows"] for b in batches])), np.arange(4 * BLOCK))
    want = embedded_pixels(dataset, images.preprocess)
    for batch in batches:
        np.testing.assert_array_equal(batch["pixels"], want[batch["rows"]])
    parts = [open_stream(images, open_tokens(dataset), config, 0, (p, 2)).batches for p in range(2)]
    for key in ("pixels", "ids", "rows"):
        np.testing.assert_array_equal(np.concatenate([part[5][key] for part in parts]), batches[5][key])


def test_remote_images_are_read_by_range(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(12))
    with file_server(tmp_path) as server:
        index_dataset([f"{server.url}/0.tar"], tmp_path / "remote", seed=0)
        index_dataset([str(tmp_path / "0.tar")], tmp_path / "local", seed=0)
        batches = []
        for name in ("remote", "local"):
            tokenize_dataset(tmp_path / name, train_vocab=282, name="words", max_length=8)
            dataset = open_dataset(tmp_path / name)
            check_image_sources(dataset)
            batches.append(opened(dataset).batches[2])
        assert keys_of(open_dataset(tmp_path / "remote")) == keys_of(dataset)
        np.testing.assert_array_equal(batches[0]["pixels"], batches[1]["pixels"])


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_images_of_other_sources_are_those_of_embed_and_missing_ones_are_replaced(
    tmp_path: Path, kind: str
) -> None:
    files = {name: data for name, data in samples(20) if name.endswith((".jpg", ".txt"))}
    if kind == "parquet":
        names = sorted(name for name in files if name.endswith(".jpg"))
        images = [b"broken" if i == 3 else files[name] for i, name in enumerate(names)]
        table = {"jpg": images, "caption": [files[name[:-3] + "txt"].decode() for name in names]}
        pq.write_table(pa.table(table), tmp_path / "0.parquet", row_group_size=6)
        source = tmp_path / "0.parquet"
    else:
        source = tmp_path / "folder"
        source.mkdir()
        for name, data in files.items():
            (source / name).write_bytes(data)
    dataset = index_dataset([str(source)], tmp_path / "d", seed=0)
    tokenize_dataset(tmp_path / "d", train_vocab=281, name="words", max_length=8)
    if kind == "folder":
        (source / "000000003.jpg").unlink()
    check_image_sources(dataset)
    stream, want = opened(dataset), embedded_pixels(dataset)
    for step in range(4):
        batch = stream.batches[step]
        np.testing.assert_array_equal(batch["pixels"], want[batch["rows"]])
        assert batch["pixels"].any(axis=(1, 2, 3)).all()  # the row of the missing image is zero in `want`
    [reason] = stream.batches.pixels.unreadable.values()
    assert reason == (
        "not a JPEG, PNG, WebP, GIF or BMP image" if kind == "parquet" else "image file not found"
    )
    assert stream.unreadable == "1 unreadable image was replaced by other rows of the same block"


def test_block_without_readable_images_raises_one_line(tmp_path: Path) -> None:
    members = [(name, b"nothing" if name.endswith("jpg") else data) for name, data in samples(20)]
    write_tar(tmp_path / "0.tar", members)
    index_dataset([str(tmp_path / "0.tar")], tmp_path / "d", seed=0)
    tokenize_dataset(tmp_path / "d", train_vocab=282, name="words", max_length=8)
    stream = opened(open_dataset(tmp_path / "d"))
    with pytest.raises(UserError, match=r"cannot be read \(not a JPEG, .* nor can those of 64 rows near it"):
        next(stream.iterate(0))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", "restore it, or if it has moved"),
        ("changed", "restore it, or index the sources as a new dataset"),
        ("imported", "was imported as features and has no images to train an image tower on"),
        ("folder", "none of 8 sampled images"),
    ],
)
def test_check_image_sources_of_missing_images_raises_one_line(
    tmp_path: Path, what: str, message: str
) -> None:
    if what == "imported":
        writer = DatasetWriter(tmp_path / "d")
        writer.add(Row("k", 0, 0, 0, ("a caption",)))
        dataset = writer.finish(seed=0, sources=[Source("/f.npy", 0, "features")])
    elif what == "folder":
        for number in range(8):
            (tmp_path / f"images/{number % 2}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"images/{number % 2}/{number}.jpg").write_bytes(encoded(picture(number)))
        dataset = index_dataset([str(tmp_path / "images")], tmp_path / "d", seed=0)
        shutil.rmtree(tmp_path / "images/0")
        shutil.rmtree(tmp_path / "images/1")
    else:
        write_tar(tmp_path / "0.tar", samples(3))
        dataset = index_dataset([str(tmp_path / "0.tar")], tmp_path / "d", seed=0)
        if what == "gone":
            (tmp_path / "0.tar").unlink()
        else:
            write_tar(tmp_path / "0.tar", samples(4))
    with pytest.raises(UserError, match=message) as error:
        check_image_sources(dataset)
    assert "\n" not in str(error.value)


def test_prefetch_is_bounded_by_the_memory(dataset: Dataset) -> None:
    images = Images(dataset, Preprocess("tf-squash", 224, 224))
    size = 4096 * 224 * 224 * 3
    assert images.prefetch(4096, 100 * size) == 3
    assert images.prefetch(4096, 8 * size) == 2
    assert images.prefetch(4096, 6 * size) == 1
    with pytest.raises(UserError, match=r"a batch of 4,096 images of 224 x 224 pixels takes 0.57 GiB"):
        images.prefetch(4096, 5 * size)
