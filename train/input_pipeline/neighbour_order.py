"""The order of an epoch whose batches are composed of groups of similar images (section 4.8 of the SigLIP paper).

Goals
  * Every row once per epoch; the order is a pure function of (seed, epoch) and of the rows' nearest neighbours.
  * Every row is in one group with at least K - 1 of its neighbours, or of its neighbours' neighbours.
  * The groups change with every epoch, so that a row meets different neighbours.

Mechanism
  1. The rows are visited in random order. A row without a group makes one with the nearest K - 1 of its neighbours that
     have none. If there are fewer, the row waits.
  2. The rows that still wait afterwards, about a fifth of all, each join the group of their nearest neighbour whose
     group has room: groups grow to at most 2 K - 1 rows.
  3. Rows whose neighbours are all in full groups are groups of their own.
  4. The groups are shuffled and written one after another. The end of a batch may cut a group in two.

Rows are visited in parts, and all rows of a part choose at once. Where two of them want the same row, the earlier one
gets it and the later one chooses again. A part is small, so that nearly all choices are those of one row after another.
"""

from __future__ import annotations

import numpy as np

from lit_fast.utils.permutation import permutation

VERSION = 1  # raise it when the order changes
_PARTS = 64  # in which the rows of an epoch are visited
_VISITS, _GROUPS = range(2)  # keys of independent permutations


def neighbour_order(neighbours: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the n rows in the order of an epoch, int64 [n]; the rows of a group are consecutive.

    Args:
      neighbours: int32 [n, links], each row's neighbours by increasing distance; -1: none.
      size: rows of a group, at least 2.
      seed: of the run.
      epoch: its number.
    """
    group_of = assign_groups(neighbours, size, permutation(len(neighbours), seed, epoch, _VISITS))
    shuffled = permutation(int(group_of.max()) + 1, seed, epoch, _GROUPS)
    return np.argsort(shuffled[group_of], kind="stable")


def assign_groups(neighbours: np.ndarray, size: int, visits: np.ndarray) -> np.ndarray:
    """Return the group of each of n rows, int64 [n], numbered from 0.

    Args:
      neighbours: as of `neighbour_order`.
      size: rows of a group.
      visits: int64 [n], the rows in the order in which they make groups.
    """
    n = len(neighbours)
    group_of = np.full(n + 1, -1)  # the last element is for "no neighbour": it never gets a group
    is_free = np.ones(n + 1, bool)
    is_free[n] = False
    owner = np.empty(n, np.int64)
    count, part = 0, -(-n // _PARTS)
    for first in range(0, n, part):
        waiting = visits[first : first + part]
        while len(waiting := waiting[is_free[waiting]]):
            candidates = neighbours[waiting]
            usable = is_free[candidates]
            enough = usable.sum(axis=1) >= size - 1
            waiting, candidates, usable = waiting[enough], candidates[enough], usable[enough]
            chosen = candidates[usable & (usable.cumsum(axis=1) < size)].reshape(-1, size - 1)
            members = np.concatenate([waiting[:, None], chosen], axis=1)
            numbers = np.arange(len(members))[:, None]
            owner[members[::-1]] = numbers[::-1]  # of equal indices the last counts: the earliest visit
            complete = (owner[members] == numbers).all(axis=1)
            members, waiting = members[complete], waiting[~complete]
            group_of[members] = count + np.arange(len(members))[:, None]
            is_free[members] = False
            count += len(members)
    count = _join_groups(group_of, count, neighbours, size, visits[is_free[visits]])
    return group_of[:n]


def _join_groups(
    group_of: np.ndarray, count: int, neighbours: np.ndarray, size: int, waiting: np.ndarray
) -> int:
    """Assign the waiting rows, int64 [m], to groups of their neighbours or of their own; return the number of groups.

    Args:
      group_of: int64 [n + 1], -1 for waiting rows and at the end; changed in place.
      count: groups so far, each of `size` rows.
      neighbours, size: as of `assign_groups`.
    """
    room = np.full(count + 1, size - 1)
    room[count] = 0  # of group -1
    joined = group_of.copy()  # rows join groups of step 1, not those of rows that have joined themselves
    for column in neighbours.T:
        wanted = joined[column[waiting]]
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        place = np.arange(len(order)) - np.searchsorted(
            ordered, ordered
        )  # among those that want the same group
        accepted = np.zeros(len(waiting), bool)
        accepted[order] = place < room[ordered]
        group_of[waiting[accepted]] = wanted[accepted]
        room -= np.bincount(wanted[accepted], minlength=count + 1)
        waiting = waiting[~accepted]
    group_of[waiting] = count + np.arange(len(waiting))
    return count + len(waiting)
