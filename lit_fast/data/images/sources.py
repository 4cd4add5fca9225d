"""Check that the sources of a dataset are the files that were indexed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lit_fast.data.dataset import Dataset, Source
from lit_fast.data.images.fingerprint import file_digest
from lit_fast.data.images.noise import is_noise
from lit_fast.errors import UserError, unreadable
from lit_fast.storage import files as storage
from lit_fast.storage.files import file_status, is_directory
from lit_fast.storage.paths import ELSEWHERE, is_url, parent

_THREADS = 16  # for remote sources, which need requests


def size_and_etag(path: str) -> tuple[int, str]:
    """Return the bytes and the ETag ("" for local files) of a file; 0 bytes for a directory and for noise.

    Raises:
      UserError: the file cannot be read, or is neither a regular file nor a directory.
    """
    return (0, "") if is_noise(path) else storage.size_and_etag(path)


def identify(source: Source) -> Source:
    """Return a source with the size, ETag, time and digest of the file that is at its path now.

    Raises:
      UserError: the file cannot be read, or is neither a regular file nor a directory.
    """
    if is_remote_directory(source):
        return source
    size, etag = size_and_etag(source.path)
    found = replace(source, bytes=size, etag=etag, modified=0, digest="")
    if not size or etag:
        return found
    return replace(found, modified=_modified(source.path), digest=_digest(source.path, size))


def identify_all(sources: Sequence[Source]) -> list[Source]:
    """Return `identify` of all sources."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(identify, sources))


def check_sources(dataset: Dataset) -> None:
    """Check all sources; no row is read.

    Raises:
      UserError: a source is missing or has changed.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda source: check_source(source, dataset.path), dataset.sources))


def check_source(source: Source, dataset: str) -> None:
    """Check one source of the dataset at the path `dataset`.

    Raises:
      UserError: it is missing, has changed or never had images.
    """
    if source.kind == "features":
        raise UserError(
            f"{dataset} was imported as features and has no images; index the images as a dataset"
        )
    if places := absent_places([source]):
        raise UserError(
            f"the images of {dataset} are not here, since it was pulled without them (source {source.path}); connect "
            f"them with: lit-fast index --relocate {places[0]}=DIRECTORY {dataset}"
        )
    try:
        change = find_change(source)
    except UserError as error:
        raise UserError(
            f"source {source.path} of {dataset}: {error.problem}; restore it, or if it has moved: lit-fast index "
            f"--relocate OLD=NEW {dataset}"
        ) from None
    if change:
        raise UserError(f"source {source.path} {change}; restore it, or index the sources as a new dataset")
    if source.images and not is_url(source.images) and not is_directory(source.images):
        raise UserError(
            f"{source.images}, the images of {source.path}, is missing; restore it, or if it has moved: lit-fast "
            f"index --relocate OLD=NEW {dataset}"
        )


def absent_places(sources: Sequence[Source]) -> list[str]:
    """Return the places of the images of a pulled dataset, which only another machine has, for `--relocate`."""
    found = (s.path for s in sources if s.kind != "features" and s.path.startswith(ELSEWHERE))
    return sorted({path if path.count("/") == 2 else parent(path) for path in found})


def find_change(source: Source) -> str:
    """Return how the file of a source differs from the indexed one, "" if it does not.

    A file of the same size that was copied or touched since has another time. Then its digest decides.

    Raises:
      UserError: it cannot be read.
    """
    if is_remote_directory(source):
        return ""
    size, etag = size_and_etag(source.path)
    if size != source.bytes:
        return f"has {size} bytes, but had {source.bytes} when it was indexed"
    if etag != source.etag:
        return "is another file than when it was indexed (its ETag changed)"
    if etag or (source.modified and _modified(source.path) == source.modified):
        return ""
    return find_other_content(source)


def find_other_content(source: Source) -> str:
    """Compare a file of the recorded size with the recorded digest; return the difference, "" without any.

    Raises:
      UserError: it cannot be read.
    """
    if source.digest and _digest(source.path, source.bytes) != source.digest:
        return "has other content than when it was indexed"
    return ""


def is_remote_directory(source: Source) -> bool:
    """Whether a source is a directory of images at a URL: there is no file to compare."""
    return not source.bytes and source.kind in ("folder", "pairs") and is_url(source.path)


def _modified(path: str) -> int:
    return 0 if is_url(path) else file_status(path).modified


def _digest(path: str, size: int) -> str:
    try:
        return file_digest(path, size)
    except OSError as error:
        raise unreadable(path, error) from None
