"""The nearest neighbours of every image of a dataset, by the cosine of its features.

    D/features/<tower>/neighbours/<links>-{plain,centered}-<digest>.int32   [n, links], little-endian; its BLAKE2b-128
    D/features/<tower>/neighbours/.lock

The n usable rows are numbered in their order; -1 stands for no neighbour. The digest is over everything that the
neighbours depend on: rows, features, usable rows and the method. A file is written once, atomically, and every later
training reads it.

Up to 65 536 rows are compared all with all: n^2 products. More rows are first clustered, by k-means on a sample, into
clusters of 1024 rows on average; a row is compared with the rows of its own cluster and of the 7 nearest ones. That is
about n (n / 1024 + 8 * 1024) products, of which the devices compute blocks. The processes of a job share the blocks.
Memory is that of the features and of the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from lit_fast.data.features import Features
from lit_fast.errors import UserError
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import list_names, read_bytes, remove
from lit_fast.storage.lock import InUseError, Lock
from lit_fast.storage.paths import join
from lit_fast.utils.normalize import normalize
from lit_fast.utils.output import status
from lit_fast.utils.permutation import permutation
from lit_fast.utils.progress import Progress

_SUFFIX = ".int32"
_METHOD = 1  # version of the search; a change of its result increments it
_CHECKSUM = 16  # bytes
_EXACT_ROWS = 1 << 16  # compared all with all
_QUERIES = 1024  # rows of a block
_CANDIDATES = 4096  # rows that a block is compared with at a time
_CLUSTER = 1024  # mean rows of a cluster
_LARGEST = 8192  # rows; a larger cluster is split
_NEAR_CLUSTERS = 8  # that a row is compared with, its own included
_SAMPLE = 32  # rows for each cluster of the k-means
_ITERATIONS = 5  # of the k-means
_BROADCAST = 1 << 22  # rows * links that are sent at a time


@dataclass(frozen=True)
class Vectors:
    """The features that are compared: those of the usable rows, as the loss takes them."""

    features: np.ndarray  # bfloat16 [rows, width]
    rows: np.ndarray  # int64 [n], the usable ones
    mean: np.ndarray  # float32 [width], subtracted before normalizing

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: np.ndarray) -> jax.Array:
        """Return normalized vectors, float32 [m, width], of usable rows; those of -1 are arbitrary."""
        return _embed(self.features[self.rows[numbers]], self.mean)


def open_neighbours(store: Features, vectors: Vectors, links: int, *, center: bool) -> np.ndarray:
    """Return the neighbours of the usable rows; compute and store them where they are not stored yet.

    Call it in all processes of the job. The first one reads and writes the file.

    Args:
      store: the features.
      vectors: the usable ones, in memory.
      links: neighbours per row.
      center: whether the mean is subtracted; part of the file's name.

    Returns:
      int32 [n, links], by decreasing cosine; -1 where there are fewer. The same bits in all processes.

    Raises:
      UserError: another training holds the lock for an hour, or the file is damaged.
    """
    digest = _digest(store, vectors, links, center)
    kind = f"{links}-{'centered' if center else 'plain'}-"
    directory = join(store.path, "neighbours")
    path, shape = join(directory, f"{kind}{digest}{_SUFFIX}"), (len(vectors), links)
    found, lock = None, None
    if jax.process_index() == 0:
        found = _read(path, shape)
        if found is None:
            lock = _lock(directory)
            found = _read(path, shape)  # another training may have computed them meanwhile
    try:
        if broadcast_one_to_all(np.int32(found is not None)):
            return _broadcast(found, shape)
        found = find_neighbours(vectors, links)
        if lock:
            lock.check()
            _write(path, found)
            for name in list_names(directory):  # those of the dataset before it has grown
                if name.startswith(kind) and name.endswith(_SUFFIX) and join(directory, name) != path:
                    remove(join(directory, name))
        return found
    finally:
        if lock:
            lock.release()


def _digest(store: Features, vectors: Vectors, links: int, center: bool) -> str:
    manifests = [manifest.features for manifest in store.manifests().values()]
    value: list[Any] = [_METHOD, store.dataset.digest, store.identity, manifests, links, center]
    value += [_EXACT_ROWS, _CLUSTER, _NEAR_CLUSTERS, vectors.rows.shape]
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(vectors.rows).tobytes())
    return digest.hexdigest()


def _lock(directory: str) -> Lock | None:
    """Lock the stored neighbours; None where they cannot be stored."""
    try:
        return Lock(join(directory, ".lock"), directory, "wait until it has found the neighbours", wait=3600)
    except InUseError:
        raise
    except UserError as error:
        status(f"the nearest neighbours are computed and not stored: {error.problem}")
        return None


def _read(path: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the stored neighbours; None: there are none."""
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    size = 4 * shape[0] * shape[1]
    content = memoryview(data)[:size]
    if len(data) != size + _CHECKSUM or _checksum(content) != data[size:]:
        raise UserError(f"{path} is damaged; delete it, then rerun the same command")
    return np.frombuffer(content, "<i4").reshape(shape).astype(np.int32)


def _write(path: str, neighbours: np.ndarray) -> None:
    content = neighbours.astype("<i4").tobytes()
    write_atomic(path, content + _checksum(content))


def _checksum(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM).digest()


def _broadcast(found: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """Return the neighbours of the first process in all processes."""
    if jax.process_count() == 1 and found is not None:
        return found
    found = np.empty(shape, np.int32) if found is None else found
    rows = max(1, _BROADCAST // max(1, shape[1]))
    for first in range(0, shape[0], rows):
        part = found[first : first + rows]
        part[...] = np.asarray(broadcast_one_to_all(np.ascontiguousarray(part)))
    return found


# --- the search


def find_neighbours(vectors: Vectors, links: int) -> np.ndarray:
    """Find the nearest neighbours of n rows: int32 [n, links] by decreasing cosine, -1 where there are fewer.

    Exact, up to the rounding of float32, for at most 65 536 rows; see above for more. In a job all processes compute
    parts, and all return the same.
    """
    n = len(vectors)
    everything = np.arange(n)
    clusters = [everything] if n <= _EXACT_ROWS else _make_clusters(vectors)
    near = _near_clusters(vectors, clusters)
    blocks = [
        (number, members[first : first + _QUERIES])
        for number, members in enumerate(clusters)
        for first in range(0, len(members), _QUERIES)
    ]

    def search(block: int) -> np.ndarray:
        number, queries = blocks[block]
        candidates = np.concatenate([clusters[i] for i in near[number]])
        return _nearest(vectors, queries, candidates, links)

    neighbours = np.empty((n, links), np.int32)
    progress = Progress("nearest neighbours", n, "images")
    for (_, queries), found in zip(blocks, _in_processes(search, len(blocks)), strict=True):
        neighbours[queries] = found[: len(queries)]
        if jax.process_index() == 0:
            progress.advance(len(queries))
    if jax.process_index() == 0:
        progress.close()
    return neighbours


def _in_processes(compute: Callable[[int], np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield `compute(0)`, `compute(1)`, ... in all processes, each computed by one of them."""
    processes, rank = jax.process_count(), jax.process_index()
    for first in range(0, count, processes):
        own = compute(min(first + rank, count - 1))
        if processes == 1:
            yield own
        else:
            yield from np.asarray(process_allgather(own))[: count - first]


def _nearest(vectors: Vectors, queries: np.ndarray, candidates: np.ndarray, links: int) -> np.ndarray:
    """Return the nearest candidates of up to 1024 rows, int32 [1024, links]."""
    numbers = _pad(queries, _QUERIES)
    images = vectors.read(numbers)
    best = jnp.full((_QUERIES, links), -jnp.inf), jnp.full((_QUERIES, links), -1)
    for first in range(0, len(candidates), _CANDIDATES):
        part = _pad(candidates[first : first + _CANDIDATES], _CANDIDATES)
        best = _merge(best, images, numbers, vectors.read(part), part)
    return np.asarray(best[1])


def _pad(numbers: np.ndarray, length: int) -> np.ndarray:
    return np.pad(numbers, (0, length - len(numbers)), constant_values=-1).astype(np.int32)


@jax.jit
def _embed(features: jax.Array, mean: jax.Array) -> jax.Array:
    return normalize(features.astype(jnp.float32) - mean)


@jax.jit
def _merge(
    best: tuple[jax.Array, jax.Array],
    images: jax.Array,
    numbers: jax.Array,
    candidates: jax.Array,
    candidate_numbers: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Merge more candidates into the best (cosines float32, numbers int32) [queries, links]."""
    cosine = jnp.einsum("nd,md->nm", images, candidates, precision="highest")
    is_other = (candidate_numbers >= 0) & (candidate_numbers != numbers[:, None])
    cosine = jnp.concatenate([best[0], jnp.where(is_other, cosine, -jnp.inf)], axis=1)
    found = jnp.broadcast_to(candidate_numbers, is_other.shape)
    found = jnp.concatenate([best[1], jnp.where(is_other, found, -1)], axis=1)
    cosine, index = jax.lax.top_k(cosine, best[0].shape[1])
    return cosine, jnp.take_along_axis(found, index, axis=1)


# --- clusters


def _make_clusters(vectors: Vectors) -> list[np.ndarray]:
    """Divide the rows into clusters of nearby rows, each int64 [at most 8192]."""
    n = len(vectors)
    count = -(-n // _CLUSTER)
    sample = permutation(n, _METHOD)[: count * _SAMPLE]
    centroids = np.asarray(vectors.read(sample[:count]))
    for _ in range(_ITERATIONS):
        centroids = _mean_of_clusters(vectors, sample, _assign(vectors, sample, centroids), centroids)
    cluster = _assign(vectors, np.arange(n), centroids, Progress("clusters of images", n, "images"))
    members = np.argsort(cluster, kind="stable")
    ends = np.flatnonzero(np.diff(cluster[members])) + 1
    return [
        whole[first : first + _LARGEST]
        for whole in np.split(members, ends)
        for first in range(0, len(whole), _LARGEST)
    ]


def _assign(
    vectors: Vectors, numbers: np.ndarray, centroids: np.ndarray, progress: Progress | None = None
) -> np.ndarray:
    """Return the nearest centroid, int32 [m], of each of m rows; the same in all processes."""
    on_device = jnp.asarray(centroids)
    parts = [numbers[first : first + _CANDIDATES] for first in range(0, len(numbers), _CANDIDATES)]

    def assign(part: int) -> np.ndarray:
        return np.asarray(_nearest_centroid(vectors.read(_pad(parts[part], _CANDIDATES)), on_device))

    nearest = []
    for part, found in zip(parts, _in_processes(assign, len(parts)), strict=True):
        nearest.append(found[: len(part)])
        if progress and jax.process_index() == 0:
            progress.advance(len(part))
    if progress and jax.process_index() == 0:
        progress.close()
    return np.concatenate(nearest)


@jax.jit
def _nearest_centroid(images: jax.Array, centroids: jax.Array) -> jax.Array:
    return jnp.argmax(jnp.einsum("nd,md->nm", images, centroids, precision="highest"), axis=1)


def _mean_of_clusters(
    vectors: Vectors, numbers: np.ndarray, cluster: np.ndarray, centroids: np.ndarray
) -> np.ndarray:
    """Return the normalized means of the rows of each cluster; an empty cluster keeps its centroid."""
    sums = np.zeros_like(centroids)
    for first in range(0, len(numbers), _CANDIDATES):
        part = numbers[first : first + _CANDIDATES]
        images = np.asarray(vectors.read(_pad(part, _CANDIDATES)))[: len(part)]
        np.add.at(sums, cluster[first : first + len(part)], images)
    empty = np.bincount(cluster, minlength=len(centroids)) == 0
    return normalize(np.where(empty[:, None], centroids, sums))


def _near_clusters(vectors: Vectors, clusters: list[np.ndarray]) -> list[np.ndarray]:
    """Return for each cluster the numbers of the clusters that its rows are compared with, its own first."""
    if len(clusters) <= _NEAR_CLUSTERS:
        return [np.arange(len(clusters))] * len(clusters)
    samples = [
        np.asarray(vectors.read(_pad(members[:_QUERIES], _QUERIES)))[: len(members)] for members in clusters
    ]
    means = normalize(np.stack([sample.mean(axis=0) for sample in samples]))
    near = []
    for number, mean in enumerate(means):
        cosine = means @ mean
        cosine[number] = np.inf
        near.append(np.argsort(-cosine, kind="stable")[:_NEAR_CLUSTERS])
    return near
