"""The nearest neighbours of stored features: exact for small sets, near enough for large ones, stored once."""

import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data import neighbours as module
from lit_fast.data.features import open_features
from lit_fast.data.neighbours import Vectors, find_neighbours, open_neighbours
from lit_fast.errors import UserError
from lit_fast.storage.files import list_names
from lit_fast.storage.lock import Lock
from tests.synthetic import make_dataset, write_features

WIDTH, LINKS = 16, 12


def draw(n, seed=0, groups=0, width=WIDTH):
    """Draw n vectors, around `groups` centres if there are any."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, width))
    if groups:
        values = 0.4 * values + rng.normal(size=(groups, width))[np.arange(n) % groups]
    return Vectors(
        values.astype(ml_dtypes.bfloat16), np.arange(n), rng.normal(size=width).astype(np.float32) / 4
    )


def cosines(vectors):
    """Return the cosines of all rows, float64 [n, n]; -2 for a row with itself."""
    values = vectors.features[vectors.rows].astype(np.float64) - vectors.mean
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    cosine = values @ values.T
    np.fill_diagonal(cosine, -2)
    return cosine


def recall(vectors, found):
    """Return the share of the true neighbours that were found."""
    nearest = np.argsort(-cosines(vectors), axis=1)[:, : found.shape[1]]
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(nearest, found, strict=True)]) / found.shape[1]


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**32), repeated=st.booleans())
def test_neighbours_of_few_rows_equal_brute_force(n, seed, repeated):
    vectors = draw(n, seed)
    if repeated:
        vectors.features[n // 2 :] = vectors.features[0]
    found, cosine = find_neighbours(vectors, LINKS), cosines(vectors)
    count = min(LINKS, n - 1)
    assert (found[:, :count] >= 0).all()
    assert (found[:, count:] == -1).all()
    got = np.take_along_axis(cosine, found[:, :count].astype(np.int64), axis=1)
    # Rows of equal cosine may be exchanged; float32 rounds a cosine by 1e-7.
    np.testing.assert_allclose(got, -np.sort(-cosine, axis=1)[:, :count], atol=1e-6)
    assert all(len(set(row)) == count for row in found[:, :count].tolist())


def test_neighbours_are_those_of_the_usable_rows_alone():
    vectors = draw(60)
    rows = np.arange(5, 50, 3)
    found = find_neighbours(Vectors(vectors.features, rows, vectors.mean), LINKS)
    want = find_neighbours(Vectors(vectors.features[rows], np.arange(len(rows)), vectors.mean), LINKS)
    np.testing.assert_array_equal(found, want)


def test_neighbours_by_clusters_are_nearly_all_of_the_nearest(monkeypatch):
    monkeypatch.setattr(module, "_EXACT_ROWS", 1000)
    monkeypatch.setattr(module, "_CLUSTER", 200)
    monkeypatch.setattr(module, "_NEAR_CLUSTERS", 5)
    vectors = draw(4000, groups=200)
    found = find_neighbours(vectors, LINKS)
    assert found.min() >= 0
    assert not (found == np.arange(4000)[:, None]).any()
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()
    assert recall(vectors, found) > 0.8  # with a quarter of the products


def test_clusters_of_equal_images_are_split(monkeypatch):
    monkeypatch.setattr(module, "_EXACT_ROWS", 1000)
    monkeypatch.setattr(module, "_LARGEST", 500)
    vectors = draw(3000)
    vectors.features[:2900] = vectors.features[0]
    found = find_neighbours(vectors, LINKS)
    assert (found[:2900] < 2900).all()
    assert (found >= 0).all()


@pytest.fixture
def store(tmp_path):
    return open_features(make_dataset(tmp_path / "d", 50))


def opened(store, center=False, rows=50):
    features = store.read_all()
    mean = store.mean(()) if center else np.zeros(store.width, np.float32)
    return open_neighbours(store, Vectors(features, np.arange(rows), mean), LINKS, center=center)


def files(store):
    return [name for name in list_names(f"{store.path}/neighbours") if name != ".lock"]


def test_neighbours_are_computed_once_and_stored(store, capfd):
    first = opened(store)
    (name,) = files(store)
    assert "nearest neighbours 50/50 images" in capfd.readouterr().err
    np.testing.assert_array_equal(opened(store), first)
    assert "nearest neighbours" not in capfd.readouterr().err
    opened(store, center=True)
    opened(store)
    assert len(files(store)) == 2
    opened(store, rows=49)  # the dataset has changed: the file of the old one is deleted
    assert len(files(store)) == 2
    assert name not in files(store)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b""])
def test_damaged_neighbours_are_refused(store, change):
    opened(store)
    path = f"{store.path}/neighbours/{files(store)[0]}"
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(change(data))
    with pytest.raises(UserError, match=r"\.int32 is damaged; delete it, then rerun the same command$"):
        opened(store)


def test_neighbours_that_cannot_be_stored_are_computed_again(store, capfd):
    with open(f"{store.path}/neighbours", "w"):
        pass  # no directory can be made here
    first = opened(store)
    assert "the nearest neighbours are computed and not stored: " in capfd.readouterr().err
    np.testing.assert_array_equal(opened(store), first)


def test_neighbours_that_another_process_computes_are_waited_for(store):
    thread = threading.Thread(target=opened, args=(store,))
    with Lock(f"{store.path}/neighbours/.lock", store.path, "wait"):
        thread.start()
        thread.join(0.2)
        assert not files(store)
    thread.join()
    assert len(files(store)) == 1


def test_features_of_other_content_have_other_neighbours(store):
    opened(store)
    before = files(store)
    write_features(store.dataset, np.random.default_rng(1).normal(size=(50, store.width)), tower="other")
    other = open_features(store.dataset, "other")
    opened(other)
    assert files(other) != before
