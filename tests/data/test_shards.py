"""Whole blocks of shard files: equal to what TensorStore reads, or an error."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data.dataset import BLOCK, SHARD, Dataset
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.errors import UserError

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
