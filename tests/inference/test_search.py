"""Search against a sort of all cosines in float64."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data.dataset import Source, open_dataset
from lit_fast.data.dataset_writer import DatasetWriter, Row
from lit_fast.data.features import open_features
from lit_fast.errors import UserError
from lit_fast.inference.search import read_hits, search
from tests.synthetic import write_features

WIDTH, ROWS = 8, 2500  # two full blocks and a short one
CLOSE = 1e-6  # rounding of float32 cosines
INVALID = (0, 7, 1023, 1024, 2499)


def dataset(path, values, invalid=()):
    writer = DatasetWriter(path)
    for r in range(len(values)):
        writer.add(Row(f"key {r}", 0, 0, 0, (f"caption {r}",) if r % 2 else ()))
    made = writer.finish(seed=0, sources=[Source("/nowhere.tar", 1)])
    write_features(made, values, invalid=invalid)
    return open_features(made)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Few different vectors, so that there are ties in every search; some rows invalid."""
    rng = np.random.default_rng(0)
    values = rng.integers(-2, 3, (40, WIDTH))[rng.integers(0, 40, ROWS)].astype(np.float64)
    values[~values.any(axis=1)] = 1
    values[list(INVALID)] = 0
    return dataset(tmp_path_factory.mktemp("search") / "d", values, INVALID)


def unit(x):
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + np.float32(1e-8))


def embedder(mean, head=None, dtype=np.float32):
    """Embed features as a model does; without head where it has none."""

    def embed(features):
        x = unit(features.astype(dtype) - mean.astype(dtype))
        return x if head is None else unit(x @ head.astype(dtype))

    return embed


def check(features, queries, mean, top, head=None):
    """Compare `search` with the float64 cosines of all rows; returns what it found."""
    everything = search(features, queries, top, embedder(mean, head))
    exact = embedder(mean, head, np.float64)(features.read_all()[:, : features.width]) @ queries.T.astype(
        np.float64
    )
    exact[sorted(features.invalid_rows())] = -np.inf
    count = min(top, int(np.isfinite(exact[:, 0]).sum()))
    for found, want in zip(everything, exact.T, strict=True):
        rows, cosines = [r for r, _ in found], np.array([c for _, c in found])
        assert len(set(rows)) == len(rows) == count
        np.testing.assert_allclose(cosines, want[rows], rtol=0, atol=CLOSE)
        # The best rows, in their order, up to the rounding of float32.
        np.testing.assert_allclose(want[rows], np.sort(want)[::-1][:count], rtol=0, atol=2 * CLOSE)
        for (row, cosine), (next_row, next_cosine) in itertools.pairwise(found):
            assert cosine > next_cosine or (cosine == next_cosine and row < next_row)
    return everything


def normal(rng, count, width):
    return unit(rng.normal(size=(count, width))).astype(np.float32)


@given(
    st.integers(0, 1000), st.integers(1, 3), st.sampled_from([1, 5, 60, 5000]), st.booleans(), st.booleans()
)
@settings(max_examples=12, deadline=None)
def test_search_finds_the_rows_of_a_full_sort(features, seed, count, top, centred, headed):
    rng = np.random.default_rng(seed)
    mean = (rng.integers(-1, 2, WIDTH) / 4 if centred else np.zeros(WIDTH)).astype(np.float32)
    head = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) if headed else None
    check(features, normal(rng, count, WIDTH), mean, top, head)


def test_search_of_real_valued_features_finds_the_rows_of_a_full_sort(tmp_path):
    rng = np.random.default_rng(1)
    store = dataset(tmp_path / "d", rng.normal(size=(1500, 24)) + 3)
    head = (np.eye(24) + 0.3 * rng.normal(size=(24, 24))).astype(np.float32)
    for kernel in (None, head):
        check(store, normal(rng, 4, 24), store.mean(()), 30, kernel)


def test_search_of_equal_cosines_returns_the_lower_rows_first(tmp_path):
    values = np.zeros((2100, 4))  # cosines are 1, 0 and -1, without rounding
    values[:, 0] = 1
    values[5:1500] = -values[5:1500]
    store = dataset(tmp_path / "d", values, invalid=(1, 1600))
    query = np.eye(4, dtype=np.float32)[:1]
    ((*found,),) = check(store, query, np.zeros(4), 103)
    assert [r for r, _ in found] == [0, 2, 3, 4, *range(1500, 1600)][:103]
    ((*found,),) = check(store, -query, np.zeros(4), 50)
    assert [r for r, _ in found] == list(range(5, 55))


def test_search_twice_finds_the_same(features):
    queries = normal(np.random.default_rng(2), 5, WIDTH)
    embed = embedder(np.zeros(WIDTH, np.float32))
    assert search(features, queries, 200, embed) == search(features, queries, 200, embed)


def test_read_hits_returns_keys_and_captions(features):
    hits = read_hits(features.dataset, [(1030, 0.5), (3, 0.25)])
    assert [(h.row, h.key, h.captions, h.cosine) for h in hits] == [
        (1030, "key 1030", (), 0.5), (3, "key 3", ("caption 3",), 0.25)
    ]  # fmt: skip


def test_search_of_several_views_compares_the_first(tmp_path):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
    one = dataset(tmp_path / "one", first)
    two = dataset(tmp_path / "two", np.concatenate([first, second], axis=1))
    object.__setattr__(two, "provenance", two.provenance | {"width": 4, "views": 2})
    queries = normal(rng, 2, 4)
    embed = embedder(np.zeros(4))
    assert search(two, queries, 10, embed) == search(one, queries, 10, embed)


def test_search_of_damaged_features_fails_in_one_line(tmp_path):
    values = np.random.default_rng(4).normal(size=(1200, 4))
    values[1100, 2] = np.inf
    store = dataset(tmp_path / "d", values)
    query, embed = normal(np.random.default_rng(5), 1, 4), embedder(np.zeros(4))
    with pytest.raises(UserError, match="features of row 1,100 are not finite"):
        search(store, query, 1, embed)
    file = Path(store.shard_path(0))
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="a shard is missing or damaged"):
        search(store, query, 1, embed)
    Path(store.manifest_path(0)).unlink()
    with pytest.raises(UserError, match="shards are missing"):
        search(open_features(open_dataset(tmp_path / "d")), query, 1, embed)
