"""Exact search against a sort of all cosines in float64."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data.dataset import DatasetWriter, Row, Source, open_dataset
from lit_fast.data.features import open_features
from lit_fast.errors import UserError
from lit_fast.inference.search import describe, search
from tests.synthetic import write_features

WIDTH, ROWS = 8, 2500  # two full blocks and a short one
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


def sorted_all(features, queries, mean, top, head):
    """The same by a stable sort of all cosines; sums row by row, so that equal rows tie."""
    x = features.read_all().astype(np.float64)[:, : features.width] - mean
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-8
    if head is not None:
        x = np.einsum("nd,de->ne", x, head.astype(np.float64))
        x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-8
    invalid = set(features.invalid_rows())
    rows = [r for r in range(len(x)) if r not in invalid]
    out = []
    for query in queries.astype(np.float64):
        cosines = {r: np.float32(sum(x[r] * query)) for r in rows}
        out.append(sorted(rows, key=lambda r: (-cosines[r], r))[:top])
    return out


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@given(
    st.integers(0, 1000), st.integers(1, 3), st.sampled_from([1, 5, 60, 5000]), st.booleans(), st.booleans()
)
@settings(max_examples=12, deadline=None)
def test_the_best_rows_are_those_of_a_full_sort(features, seed, count, top, centred, headed):
    rng = np.random.default_rng(seed)
    queries = unit(rng.normal(size=(count, WIDTH)))
    mean = (rng.integers(-1, 2, WIDTH) / 4 if centred else np.zeros(WIDTH)).astype(np.float32)
    head = np.eye(WIDTH, dtype=np.float32)[:, ::-1] * 2 if headed else None  # exact: a permutation
    got = search(features, queries, mean, top, head)
    want = sorted_all(features, queries, mean, top, head)
    for found, rows in zip(got, want, strict=True):
        cosines = [c for _, c in found]
        assert cosines == sorted(cosines, reverse=True)
        assert len(found) == min(top, ROWS - len(INVALID))
        assert [r for r, _ in found] == rows


def test_real_valued_features_and_a_full_head(tmp_path):
    rng = np.random.default_rng(1)
    store = dataset(tmp_path / "d", rng.normal(size=(1500, 24)) + 3)
    queries, mean = unit(rng.normal(size=(4, 24))), store.mean(())
    for head in (None, (np.eye(24) + 0.3 * rng.normal(size=(24, 24))).astype(np.float32)):
        got = search(store, queries, mean, 30, head)
        assert [[r for r, _ in found] for found in got] == sorted_all(store, queries, mean, 30, head)


def test_equal_vectors_come_by_row_wherever_they_stand(tmp_path):
    values = np.tile(np.random.default_rng(2).normal(size=37), (2100, 1))  # an odd width: no row is aligned
    store = dataset(tmp_path / "d", values, invalid=(1,))
    ((*found,),) = search(store, unit(values[:1]), np.zeros(37), 50)
    assert [r for r, _ in found] == [0, *range(2, 51)]
    assert len({c for _, c in found}) == 1


def test_rows_are_described_by_key_and_captions(features):
    hits = describe(features.dataset, [(1030, 0.5), (3, 0.25)])
    assert [(h.row, h.key, h.captions, h.cosine) for h in hits] == [
        (1030, "key 1030", (), 0.5), (3, "key 3", ("caption 3",), 0.25)
    ]  # fmt: skip


def test_only_view_0_is_looked_at(tmp_path):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
    one = dataset(tmp_path / "one", first)
    two = dataset(tmp_path / "two", np.concatenate([first, second], axis=1))
    object.__setattr__(two, "provenance", two.provenance | {"width": 4, "views": 2})
    queries = unit(rng.normal(size=(2, 4)))
    assert search(two, queries, np.zeros(4), 10) == search(one, queries, np.zeros(4), 10)


def test_damage_is_one_line(tmp_path):
    values = np.random.default_rng(4).normal(size=(1200, 4))
    values[1100, 2] = np.inf
    store = dataset(tmp_path / "d", values)
    with pytest.raises(UserError, match="features of row 1,100 are not finite"):
        search(store, unit(values[:1]), np.zeros(4), 1)
    file = Path(store.shard_path(0))
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="a shard is missing or damaged"):
        search(store, unit(values[:1]), np.zeros(4), 1)
    Path(store.manifest_path(0)).unlink()
    with pytest.raises(UserError, match="shards are missing"):
        search(open_features(open_dataset(tmp_path / "d")), unit(values[:1]), np.zeros(4), 1)
