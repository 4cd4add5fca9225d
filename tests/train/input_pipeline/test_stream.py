"""The order of the data: complete, exact, and a function of (seed, step) alone."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import BLOCK
from lit_fast.data.features import Features, Manifest, open_features, with_views
from lit_fast.data.tokens import open_tokens
from lit_fast.errors import UserError
from lit_fast.storage.text_files import write_json
from lit_fast.train.input_pipeline.captions import Captions, choose_views
from lit_fast.train.input_pipeline.stream import open_stream
from lit_fast.train.input_pipeline.window_layout import WindowLayout, plan_layout
from lit_fast.utils.normalize import normalize
from tests.synthetic import make_dataset, row_numbers, write_features

MEMORY = StreamConfig(global_batch=48, captions_per_image=2)
NEIGHBOURS = replace(MEMORY, neighbours=4, corrupt_alignment=0.5)
WINDOWS = StreamConfig(global_batch=256, memory_gib=0.0, shuffle_streams=4, shuffle_window_blocks=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "d"
    return make_dataset(path, 300, captions=3, without_caption=(7,), invalid=(3, 299))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "d"
    return make_dataset(path, 19 * BLOCK + 100, captions=2, invalid=(5, 2000))


def opened(dataset, config, seed=0, part=(0, 1)):
    return open_stream(open_features(dataset), open_tokens(dataset), config, seed, part)


@pytest.mark.parametrize("config", [MEMORY, NEIGHBOURS], ids=["memory", "neighbours"])
def test_exact_shuffle_has_every_usable_row_once_per_epoch(small, config):
    source = opened(small, config).batches
    usable = 297
    rows = np.concatenate([source[i]["rows"] for i in range(40)])
    epochs = [rows[i * usable : (i + 1) * usable] for i in range(len(rows) // usable)]
    want = np.setdiff1d(np.arange(300), [3, 7, 299])
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), want)
    assert not np.array_equal(epochs[0], epochs[1])


def test_batches_join_images_captions_and_rows(small):
    tokens = open_tokens(small)
    captions = [row for block in small.iter_captions() for row in block]
    batch = opened(small, MEMORY).batches[5]
    np.testing.assert_array_equal(row_numbers(batch["images"]), batch["rows"])
    tokenizer = tokens.tokenizer()
    for i, row in enumerate(batch["rows"]):
        allowed = {tuple(ids) for ids in tokenizer(captions[row])}
        found = [tuple(ids) for ids in batch["ids"][2 * i : 2 * i + 2]]
        assert set(found) <= allowed
        if len(allowed) == len(captions[row]):  # truncation may have made two of them equal
            assert len(set(found)) == min(2, len(allowed))


def test_captions_are_used_equally_often():
    captions = Captions(np.array([0, 1, 4, 9]), np.arange(9)[:, None])
    rows = np.arange(3)
    used = Counter()
    for epoch in range(30):
        ids = captions.choose(rows, rows, np.full(3, epoch), 1, seed=3)
        used.update(ids.ravel().tolist())
    assert used == {0: 30} | {i: 10 for i in (1, 2, 3)} | {i: 6 for i in (4, 5, 6, 7, 8)}


@pytest.mark.parametrize("config", [MEMORY, WINDOWS, NEIGHBOURS], ids=["memory", "windows", "neighbours"])
def test_processes_get_slices_of_one_global_batch(small, large, config):
    dataset = large if config is WINDOWS else small
    whole = opened(dataset, config).batches
    for processes in (2, 4):
        parts = [opened(dataset, config, part=(p, processes)).batches for p in range(processes)]
        for step in (0, 1, 30, 77):
            for key, value in whole[step].items():
                joined = np.concatenate([part[step][key] for part in parts])
                np.testing.assert_array_equal(joined, value)


@pytest.mark.parametrize("config", [MEMORY, WINDOWS, NEIGHBOURS], ids=["memory", "windows", "neighbours"])
def test_order_depends_on_seed_and_step_only(small, large, config):
    dataset = large if config is WINDOWS else small
    stream = opened(dataset, config)
    steps = list(range(90))
    forward = [stream.batches[s]["rows"] for s in steps]
    other = opened(dataset, config)
    for s in reversed(steps):  # any order of asking
        np.testing.assert_array_equal(other.batches[s]["rows"], forward[s])
    for start in (0, 1, 63, 64, 71):  # resumed in a new process
        resumed = opened(dataset, config).iterate(start)
        for s in range(start, start + 8):
            batch = next(resumed)
            np.testing.assert_array_equal(batch["rows"], forward[s])
            np.testing.assert_array_equal(row_numbers(batch["images"]), batch["rows"])
    assert not np.array_equal(opened(dataset, config, seed=1).batches[0]["rows"], forward[0])
    assert opened(dataset, config).identity == stream.identity
    assert opened(dataset, config, seed=1).identity != stream.identity


@pytest.mark.parametrize(
    ("config", "digest"),
    [(MEMORY, "f8d63912f74b5027"), (WINDOWS, "963345f0b67946c4")],
    ids=["memory", "windows"],
)
def test_order_of_this_identity_is_unchanged(large, config, digest):
    """A run resumes with a later version. If you change the order, raise the number in the identity."""
    source = opened(large, config, seed=5).batches
    rows = np.concatenate([source[step]["rows"] for step in (0, 1, 2, 63, 64, 65, 130)])
    assert hashlib.blake2b(rows.astype("<i4").tobytes(), digest_size=8).hexdigest() == digest


def test_window_shuffle_returns_its_slots(tmp_path):
    dataset = make_dataset(tmp_path / "d", 16 * BLOCK, width=512, captions=1)
    config = replace(WINDOWS, shuffle_streams=2, shuffle_window_blocks=1)
    source = opened(dataset, config).batches
    shuffle = source.shuffle
    for step in range(3 * shuffle.layout.steps):
        source[step]
        in_windows = sum(window.slot is not None for window in shuffle._windows.values())
        # Each of the two streams has a window and a free slot. A slot that is not returned is missing
        # here, and one allocated beside them is one too many.
        assert in_windows + len(shuffle._free_slots) == 4


def test_stream_with_missing_captions_names_the_file(tmp_path):
    dataset = make_dataset(tmp_path / "d", 4 * BLOCK)
    stream = opened(dataset, replace(WINDOWS, shuffle_streams=2))
    (Path(dataset.path) / "tokens/words/00000.array_record").unlink()
    with pytest.raises(UserError, match=r"tokens/words/00000.array_record is missing"):
        stream.batches[0]


def test_window_shuffle_covers_an_epoch(large):
    stream = opened(large, WINDOWS)
    layout = stream.batches.shuffle.layout
    assert layout.streams == 4
    for epoch in range(3):
        first = epoch * layout.steps
        rows = np.concatenate([stream.batches[first + s]["rows"] for s in range(layout.steps)])
        # 19 blocks in 4 streams: 3 blocks are left out of an epoch.
        assert len(rows) == 16 * BLOCK
        blocks = Counter((np.unique(rows) // BLOCK).tolist())
        assert len(blocks) == 16
        assert len(np.unique(rows)) >= 16 * BLOCK - 2  # invalid rows are replaced by others of the window
        assert not {5, 2000} & set(rows.tolist())


@settings(deadline=None)
@given(
    blocks=st.integers(1, 300),
    log_batch=st.integers(0, 15),
    streams=st.integers(1, 64),
    window_blocks=st.integers(1, 8),
)
def test_window_layout_reads_every_row_of_a_stream_once(blocks, log_batch, streams, window_blocks):
    config = StreamConfig(
        global_batch=2**log_batch, shuffle_streams=streams, shuffle_window_blocks=window_blocks
    )
    if blocks * BLOCK < config.global_batch:
        with pytest.raises(UserError, match="cannot be streamed"):
            plan_layout(blocks * BLOCK, config)
        return
    layout = plan_layout(blocks * BLOCK + 17, config)
    assert layout.rows * layout.streams == config.global_batch
    for stream in {0, layout.streams - 1}:
        position, before = 0, (0, 0)
        for step in range(min(layout.steps, 3000)):
            (begin, end), start = layout.window_of(stream, step)
            if (begin, end) != before:
                assert begin == before[1]  # windows follow each other without gap
                assert 0 < end - begin <= layout.window
                before = (begin, end)
            assert begin * BLOCK + start == position
            assert position + layout.rows <= end * BLOCK  # a step never straddles two windows
            position += layout.rows
        if layout.steps <= 3000:
            assert position == end * BLOCK == layout.length * BLOCK


def test_layout_of_the_recipe():
    layout = plan_layout(12_000_000, StreamConfig())
    assert layout == WindowLayout(blocks=11718, streams=64, rows=512, unit=1, window=8)


def test_stream_with_missing_shard_or_other_rows_raises(tmp_path):
    dataset = make_dataset(tmp_path / "d", 40)
    manifest = Path(open_features(dataset).manifest_path(0))
    text = manifest.read_text()
    manifest.unlink()
    with pytest.raises(UserError, match="1 of 1 shards are missing"):
        opened(dataset, MEMORY)
    manifest.write_text(text.replace(dataset.shard_keys[0], "0" * 32))
    with pytest.raises(UserError, match="made from other rows"):
        opened(dataset, MEMORY)
    write_features(dataset, np.zeros((40, 8)), tower="second")
    with pytest.raises(UserError, match="features of second, tower; choose one"):
        opened(dataset, MEMORY)


def test_stream_with_block_without_usable_row_raises_at_open(tmp_path):
    dataset = make_dataset(tmp_path / "d", 4 * BLOCK, invalid=tuple(range(BLOCK, 2 * BLOCK)))
    with pytest.raises(UserError, match="rows 1024 to 2047"):
        opened(dataset, WINDOWS)
    assert opened(dataset, MEMORY).batches[0]["rows"].shape == (48,)


@pytest.mark.parametrize("config", [MEMORY, WINDOWS], ids=["memory", "windows"])
def test_stream_with_flipped_bit_names_the_store(tmp_path, config):
    dataset = make_dataset(tmp_path / "d", 4 * BLOCK)
    chunk = Path(dataset.path) / "features/tower/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 1
    chunk.write_bytes(data)

    def read_everything():
        stream = opened(dataset, replace(config, shuffle_streams=2))
        for step in range(16):
            stream.batches[step]

    with pytest.raises(UserError, match="features/tower cannot be read"):
        read_everything()


VIEWS = 3


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    """Three views of each row, as `make_dataset` writes one; element 2 of a vector is the view's number."""
    path = tmp_path_factory.mktemp("viewed") / "d"
    dataset = make_dataset(path, 8 * BLOCK, invalid=(3,))
    one = open_features(dataset, "tower")
    values = one.read_all().reshape(-1, 1, one.width).repeat(VIEWS, axis=1)
    values[:, :, 2] = np.arange(VIEWS)
    features = Features(dataset, "views", with_views(one.provenance, VIEWS))
    write_json(Path(features.path) / "tower.json", features.provenance)
    values = values.reshape(dataset.rows, -1)
    features.array(create=True).write(values).result()
    manifest = Manifest(0, 0, dataset.rows, dataset.shard_keys[0], features.identity, {3: "damaged"})
    features.write_manifest(manifest)
    return dataset


def opened_views(dataset, config, seed=0, part=(0, 1)):
    return open_stream(open_features(dataset, "views"), open_tokens(dataset), config, seed, part)


@pytest.mark.parametrize("config", [MEMORY, WINDOWS], ids=["memory", "windows"])
def test_views_are_drawn_in_every_epoch(viewed, config):
    stream = opened_views(viewed, config)
    counts = np.zeros((viewed.rows, VIEWS), int)
    steps = 6 * viewed.rows // config.global_batch
    forward = [stream.batches[step] for step in range(steps)]
    for batch in forward:
        np.testing.assert_array_equal(row_numbers(batch["images"]), batch["rows"])
        assert batch["images"].shape == (config.global_batch, 16)
        np.add.at(counts, (batch["rows"], batch["images"][:, 2].astype(int)), 1)
    share = counts.sum(axis=0) / counts.sum()
    # 49 152 draws: five standard deviations of a share of 1/3 are 0.011.
    np.testing.assert_allclose(share, 1 / VIEWS, atol=0.011)
    assert (counts > 0).sum(axis=1).mean() > 2.5  # (1 - (2/3)^6) * 3 = 2.74 different ones in six epochs
    other = opened_views(viewed, config)
    for step in reversed(range(0, steps, 7)):
        assert forward[step]["images"].tobytes() == other.batches[step]["images"].tobytes()
    resumed = opened_views(viewed, config).iterate(steps // 2)
    for step in range(steps // 2, steps // 2 + 5):
        assert next(resumed)["images"].tobytes() == forward[step]["images"].tobytes()
    parts = [opened_views(viewed, config, part=(p, 2)).batches for p in range(2)]
    joined = np.concatenate([part[9]["images"] for part in parts])
    assert joined.tobytes() == forward[9]["images"].tobytes()
    assert "3 views each" in stream.description


def test_views_change_the_images_and_nothing_else(viewed):
    one = open_stream(open_features(viewed, "tower"), open_tokens(viewed), MEMORY, 0)
    three = opened_views(viewed, MEMORY)
    assert one.identity != three.identity
    for key in ("rows", "ids"):
        np.testing.assert_array_equal(one.batches[11][key], three.batches[11][key])


def test_views_are_independent_of_captions():
    """As many captions as views: if views cycled too, each caption would occur with one view only."""
    rows, n = np.arange(3000), 4
    captions = Captions(np.arange(0, n * 3000 + 1, n), np.arange(n * 3000)[:, None])
    joint = np.zeros((n, n), int)
    for epoch in range(8):
        epochs = np.full(3000, epoch)
        views = choose_views(rows, rows, epochs, n, seed=1) % n
        joint += np.histogram2d(captions.choose(rows, rows, epochs, 1, seed=1)[:, 0] % n, views, bins=n)[
            0
        ].astype(int)
    # 24 000 draws in 16 cells: five standard deviations are 190.
    np.testing.assert_allclose(joint, 1500, atol=190)


@given(rows=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50), epoch=st.integers(0, 2**31 - 1),
       views=st.integers(1, 64), seed=st.integers(0, 2**31 - 1))  # fmt: skip
def test_a_view_is_a_function_of_seed_epoch_and_row(rows, epoch, views, seed):
    rows = np.array(rows)
    epochs = np.full(len(rows), epoch)
    local = np.arange(len(rows))
    got = choose_views(local, rows, epochs, views, seed)
    np.testing.assert_array_equal(got // views, local)
    for i in range(len(rows)):
        one = choose_views(local[:1], rows[i : i + 1], epochs[:1], views, seed)
        assert one[0] == got[i] % views


SMALL_WINDOWS = replace(WINDOWS, memory_gib=4.0)


def open_with(dataset, memory=None, in_memory=None):
    options = {"memory": memory, "in_memory": in_memory}
    return open_stream(open_features(dataset), open_tokens(dataset), SMALL_WINDOWS, 0, **options)


def test_dataset_that_does_not_fit_in_the_memory_of_the_machine_is_streamed(large):
    assert open_with(large).in_memory
    streamed = open_with(large, memory=1 << 20)
    assert not streamed.in_memory
    assert "as this machine may use only 0.00 GiB of memory" in streamed.description
    assert streamed.identity == opened(large, WINDOWS).identity


def test_resumed_run_keeps_the_shuffle_that_it_started_with_whatever_the_memory(large):
    assert open_with(large, in_memory=False).identity == opened(large, WINDOWS).identity
    with pytest.raises(
        UserError, match=r"was held in memory when this run started, .* GiB, and this machine may"
    ):
        open_with(large, memory=1 << 20, in_memory=True)


def test_batches_of_neighbours_have_near_images(small):
    images = normalize(open_features(small).read_all().astype(np.float32))
    images[[3, 7, 299]] = 0  # not usable
    nearest = np.argsort(-(images @ images.T), axis=1)[:, 1]

    def share(config):
        """Return the share of rows whose nearest one is in the same batch."""
        batches = opened(small, config).batches
        rows = [batches[step]["rows"] for step in range(12)]
        return np.mean([np.isin(nearest[r], r).mean() for r in rows])

    assert share(MEMORY) < 0.25  # 47 of 296 at random
    assert share(replace(MEMORY, neighbours=2)) > 0.4
    assert share(replace(MEMORY, neighbours=8)) > 0.4


def test_stream_of_neighbours_is_another_one_for_every_size_and_centering(small):
    features, tokens = open_features(small), open_tokens(small)
    configs = [(MEMORY, False)] + [(replace(MEMORY, neighbours=k), c) for k in (2, 3) for c in (False, True)]
    streams = [open_stream(features, tokens, config, 0, center=center) for config, center in configs]
    assert len({stream.identity for stream in streams}) == len(streams)
    assert "in groups of 2 or more nearest images" in streams[1].description


def test_neighbours_of_a_dataset_that_is_not_held_in_memory_are_refused(large):
    config = replace(WINDOWS, neighbours=2)
    with pytest.raises(
        UserError, match=r"^stream.neighbours needs the dataset in memory: .* above stream.memory_gib"
    ):
        opened(large, config)
    config = replace(config, memory_gib=4.0)
    with pytest.raises(
        UserError, match=r"this machine may use 0.00 GiB; use a machine with more memory, or set"
    ):
        open_stream(open_features(large), open_tokens(large), config, 0, memory=1 << 20)
