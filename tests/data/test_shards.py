"""Whole blocks of shard files: equal to what TensorStore reads, or an error."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data.dataset import BLOCK, SHARD, Dataset
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.errors import UserError
from lit_fast.storage import buckets
from lit_fast.storage.atomic import write_atomic
from tests.embed.contents import tree
from tests.gcs import running_gcs

WIDTH, VIEWS = 3, 2
BYTES = BLOCK * VIEWS * WIDTH * 2 + 4  # of a block with its crc32c


def make_features(path, rows):
    """Features alone: reading blocks needs no manifest."""
    shards = -(-rows // SHARD)
    dataset = Dataset(str(path), rows, rows, 0, 0, 0, (), ("0" * 32,) * shards, (), (), {}, {}, 0)
    return Features(dataset, "t", {"width": WIDTH, "views": VIEWS})


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Two shards, the second with a whole block and a short one; the first written whole."""
    store = make_features(tmp_path_factory.mktemp("store"), SHARD + BLOCK + 7)
    values = np.random.default_rng(0).standard_normal((store.dataset.rows, VIEWS * WIDTH)).astype(BFLOAT16)
    array = store.array(create=True)
    array[:SHARD].write(values[:SHARD]).result()
    array[SHARD:].write(values[SHARD:]).result()
    return store


def block(features, number):
    out = np.full((BLOCK, VIEWS * WIDTH), 9, BFLOAT16)
    features.block_reader().read(number, out)
    return out


def test_block_reader_equals_tensorstore(features):
    array = features.array()
    for number in range(features.dataset.blocks):
        rows = min(BLOCK, features.dataset.rows - number * BLOCK)
        want = array[number * BLOCK : number * BLOCK + rows].read().result()
        got = block(features, number)
        assert got[:rows].tobytes() == want.tobytes()
        assert not got[rows:].any()


def test_block_reader_with_blocks_in_any_order_finds_them(tmp_path):
    """A shard filled block by block has its blocks where TensorStore put them."""
    store = make_features(tmp_path, 4 * BLOCK)
    values = np.arange(4 * BLOCK).repeat(VIEWS * WIDTH).reshape(4 * BLOCK, -1).astype(BFLOAT16)
    array = store.array(create=True)
    for number in (2, 0, 3):
        array[number * BLOCK : (number + 1) * BLOCK].write(
            values[number * BLOCK : (number + 1) * BLOCK]
        ).result()
    for number in (0, 2, 3):
        assert block(store, number).tobytes() == values[number * BLOCK : (number + 1) * BLOCK].tobytes()
    with pytest.raises(
        UserError, match=r"features/t cannot be read.* rows 1024 to 2047: .* has no whole block 1; "
    ):
        block(store, 1)


def test_block_reader_of_missing_shard_names_the_store(tmp_path):
    with pytest.raises(UserError, match=r"features/t cannot be read, a shard is missing .*c/0/0"):
        block(make_features(tmp_path, BLOCK), 0)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 64 * (BYTES + 16) + 3), bit=st.integers(0, 7))
def test_block_reader_with_flipped_bit_refuses_the_block(features, tmp_path_factory, position, bit):
    """In a block's bytes or checksum exactly that block cannot be read; in the index, no block can."""
    data = bytearray(Path(features.shard_path(0)).read_bytes())
    assert len(data) == 64 * (BYTES + 16) + 4
    data[position] ^= 1 << bit
    copy = make_features(tmp_path_factory.mktemp("flipped"), SHARD)
    Path(copy.shard_path(0)).parent.mkdir(parents=True)
    Path(copy.shard_path(0)).write_bytes(data)
    bad = {position // BYTES} if position < 64 * BYTES else set(range(64))
    for number in {0, 31, 63} | bad:
        if number in bad:
            with pytest.raises(UserError, match="crc32c"):
                block(copy, number)
        else:
            assert block(copy, number).tobytes() == block(features, number).tobytes()


@settings(max_examples=30, deadline=None)
@given(length=st.integers(0, 64 * (BYTES + 16) + 3))
def test_block_reader_of_truncated_shard_raises(features, tmp_path_factory, length):
    copy = make_features(tmp_path_factory.mktemp("cut"), SHARD)
    Path(copy.shard_path(0)).parent.mkdir(parents=True)
    Path(copy.shard_path(0)).write_bytes(Path(features.shard_path(0)).read_bytes()[:length])
    with pytest.raises(UserError, match="features/t cannot be read"):
        block(copy, 5)


@settings(max_examples=50, deadline=None)
@given(offset=st.integers(0, 2**64 - 1), length=st.sampled_from([BYTES, 0, 2**64 - 1, BYTES + 1]))
def test_block_reader_with_wrong_index_and_right_checksum_raises(features, tmp_path_factory, offset, length):
    import google_crc32c

    data = Path(features.shard_path(0)).read_bytes()
    index = np.frombuffer(data[-1028:-4], "<u8").copy()
    if (offset, length) == (int(index[10]), BYTES):
        return
    index[10:12] = offset, length
    checksum = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    copy = make_features(tmp_path_factory.mktemp("lying"), SHARD)
    Path(copy.shard_path(0)).parent.mkdir(parents=True)
    Path(copy.shard_path(0)).write_bytes(data[:-1028] + index.tobytes() + checksum)
    if length == BYTES and offset % BYTES == 0 and offset < 64 * BYTES:
        assert block(copy, 5).tobytes() == block(features, offset // BYTES).tobytes()
        return
    with pytest.raises(UserError, match="features/t cannot be read"):
        block(copy, 5)


def move_blocks(path):
    """Put the blocks of a shard file 8 bytes further and swap the places of blocks 2 and 4."""
    import google_crc32c

    data = Path(path).read_bytes()
    index = np.frombuffer(data[-1028:-4], "<u8").reshape(64, 2).copy()
    order = [0, 1, 4, 3, 2, 5, 6]
    blocks = [data[start : start + length] for start, length in index[order].tolist()]
    used = index[:, 0] < 1 << 62
    index[used, 0] += 8
    moved = index.copy()
    moved[: len(order)] = index[order]
    rest = data[max(int(start) + int(length) for start, length in index[: len(order)]) - 8 : -1028]
    checksum = google_crc32c.value(moved.tobytes()).to_bytes(4, "little")
    Path(path).write_bytes(bytes(8) + b"".join(blocks) + rest + moved.tobytes() + checksum)


def test_block_reader_of_runs_reads_what_single_blocks_are(tmp_path):
    """Also where they are in another order in the file, and where one of them is damaged."""
    rows = 6 * BLOCK + 5
    store = make_features(tmp_path, rows)
    values = np.random.default_rng(0).standard_normal((rows, VIEWS * WIDTH)).astype(BFLOAT16)
    store.array(create=True)[:].write(values).result()

    def read_run(reader, first, count):
        out = np.full((count, BLOCK, VIEWS * WIDTH), 9, BFLOAT16)
        reader.read_run(first, out)
        want = values[first * BLOCK : (first + count) * BLOCK]
        assert out.reshape(-1, VIEWS * WIDTH)[: len(want)].tobytes() == want.tobytes()

    reader = store.block_reader()
    for move in (False, True):
        if move:
            move_blocks(store.shard_path(0))
        for first in range(7):
            for count in range(1, 8 - first):
                read_run(reader, first, count)
    data = bytearray(Path(store.shard_path(0)).read_bytes())
    data[8 + 3 * BYTES] ^= 1
    Path(store.shard_path(0)).write_bytes(data)
    read_run(store.block_reader(), 4, 3)
    read_run(store.block_reader(), 0, 3)
    with pytest.raises(UserError, match=r"rows 3072 to 4095: .*crc32c"):
        read_run(store.block_reader(), 0, 7)


def test_features_in_a_bucket_are_read_in_few_ranges(tmp_path, monkeypatch):
    """All in ranges of about 8 MiB; a block in one, two more once its shard has been replaced."""
    local = make_features(tmp_path, SHARD + BLOCK + 7)
    values = np.random.default_rng(0).standard_normal((local.dataset.rows, VIEWS * WIDTH)).astype(BFLOAT16)
    array = local.array(create=True)
    array[:SHARD].write(values[:SHARD]).result()
    array[SHARD:].write(values[SHARD:]).result()
    monkeypatch.setattr(buckets, "_stores", {})
    monkeypatch.setattr("lit_fast.data.shards._RUN_BYTES", 10 * BLOCK * VIEWS * WIDTH * 2)
    with running_gcs() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = make_features("gs://bucket/d", local.dataset.rows)

        def upload():
            for name, data in tree(tmp_path).items():
                write_atomic(f"{store.dataset.path}/{name}", data)

        def ranges():
            found = [sent for _, path, sent in server.requests if "%2Fc%2F" in path and "alt=media" in path]
            server.requests.clear()
            return len(found)

        upload()
        server.requests.clear()
        assert store.read_all(VIEWS).tobytes() == values.tobytes()
        assert ranges() <= 2 * (7 + 1)  # threads that start together may all read the index
        assert store.read_all(1).tobytes() == values[:, :WIDTH].tobytes()
        ranges()
        mean = store.mean({0})
        np.testing.assert_allclose(mean, values[1:, :WIDTH].astype(np.float64).mean(axis=0), atol=1e-6)
        reader, out = store.block_reader(), np.empty((BLOCK, VIEWS * WIDTH), BFLOAT16)
        ranges()
        for count in (2, 1):
            reader.read(4, out)
            assert ranges() == count
        move_blocks(local.shard_path(0))
        upload()
        for count in (3, 1):
            reader.read(4, out)
            assert out.tobytes() == values[4 * BLOCK : 5 * BLOCK].tobytes()
            assert ranges() == count
