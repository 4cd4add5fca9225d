"""Groups of nearest neighbours: every row once, near each other, others in every epoch."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.train.input_pipeline import neighbour_order as module
from lit_fast.train.input_pipeline.neighbour_order import assign_groups, neighbour_order
from lit_fast.utils.permutation import permutation


def points(n, seed, clusters=0):
    """Draw n unit vectors of eight dimensions, around `clusters` centres if there are any."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 8))
    if clusters:
        values = 0.1 * values + rng.normal(size=(clusters, 8))[np.arange(n) % clusters]
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def nearest(values, links):
    """Return the neighbours int32 [n, links] of unit vectors, by brute force; -1 where there are fewer."""
    cosine = values @ values.T
    np.fill_diagonal(cosine, -2)
    found = np.full((len(values), links), -1, np.int32)
    count = min(links, len(values) - 1)
    found[:, :count] = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
    return found


def one_after_another(neighbours, size, visits):
    """Return the groups that rows make one after another, and the rows that are left."""
    free, groups = set(visits.tolist()), []
    for row in visits.tolist():
        near = [other for other in neighbours[row].tolist() if other in free and other != row]
        if row in free and len(near) >= size - 1:
            groups.append({row, *near[: size - 1]})
            free -= groups[-1]
    return groups, free


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 150), size=st.integers(2, 12), links=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_order_of_any_epoch_has_every_row_once_in_groups_of_neighbours(n, size, links, seed):
    neighbours = nearest(points(n, seed), links)
    order = neighbour_order(neighbours, size, seed, 3)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    group_of = assign_groups(neighbours, size, permutation(n, seed))
    sizes = np.bincount(group_of)
    assert ((sizes == 1) | ((sizes >= size) & (sizes < 2 * size))).all()
    for row in np.flatnonzero(sizes[group_of] > 1):  # a member has made the group, or is a neighbour of one
        members = np.flatnonzero(group_of == group_of[row])
        near = neighbours[members]
        assert np.isin(neighbours[row], members).any() or (near == row).any()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 60), size=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_groups_made_in_parts_of_one_row_equal_one_after_another(n, size, seed):
    neighbours, visits = nearest(points(n, seed), 16), permutation(n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PARTS", n)
        group_of = assign_groups(neighbours, size, visits)
    groups, left = one_after_another(neighbours, size, visits)
    for number, group in enumerate(groups):
        assert group <= set(np.flatnonzero(group_of == number).tolist())
    assert sum(map(len, groups)) + len(left) == n


@pytest.mark.parametrize("size", [2, 5, 8])
def test_groups_are_of_one_cluster_and_nearly_as_near_as_the_nearest(size):
    values, clusters = points(2000, 1, clusters=50), np.arange(2000) % 50
    neighbours, cosine = nearest(values, 32), values @ values.T
    group_of = assign_groups(neighbours, size, permutation(2000, 1))
    same = (group_of[:, None] == group_of) & ~np.eye(2000, dtype=bool)
    assert (clusters[:, None] == clusters)[same].mean() > 0.98
    assert same.sum(axis=1).min() >= size - 1
    best = np.take_along_axis(cosine, neighbours[:, : size - 1].astype(np.int64), axis=1).mean()
    assert cosine[same].mean() > best - 0.02
    assert np.bincount(group_of).mean() < 1.3 * size


def test_epochs_and_seeds_have_other_groups():
    neighbours = nearest(points(600, 2), 32)
    groups = {}
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        order = neighbour_order(neighbours, 4, seed, epoch)
        np.testing.assert_array_equal(neighbour_order(neighbours, 4, seed, epoch), order)
        groups[seed, epoch] = assign_groups(neighbours, 4, permutation(600, seed, epoch))
    together = [groups[key][:, None] == groups[key] for key in groups]
    for a, b in [(0, 1), (0, 2)]:
        assert (together[a] & together[b]).sum() - 600 < 0.7 * (together[a].sum() - 600)


def test_order_of_this_version_is_unchanged():
    """A run resumes with a later version. If you change the order, raise VERSION."""
    neighbours = np.stack([permutation(500, 5, row)[:12] for row in range(500)]).astype(np.int32)
    neighbours[neighbours == np.arange(500)[:, None]] = -1
    order = np.concatenate([neighbour_order(neighbours, size, 7, 2) for size in (2, 5)])
    assert hashlib.blake2b(order.astype("<i4").tobytes(), digest_size=8).hexdigest() == "5cad20743d2ae339"
