"""Check that the sources of a dataset are the files that were indexed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from lit_fast.data.dataset import Dataset, Source
from lit_fast.data.images.noise import is_noise
from lit_fast.errors import UserError
from lit_fast.storage import files as storage
from lit_fast.storage.files import is_directory
from lit_fast.storage.paths import is_url


def size_and_etag(path: str) -> tuple[int, str]:
    """Return the bytes and the ETag ("" for local files) of a file; 0 bytes for a directory and for noise.

    Raises:
      UserError: the file cannot be read, or is neither a regular file nor a directory.
    """
    return (0, "") if is_noise(path) else storage.size_and_etag(path)


def check_sources(dataset: Dataset) -> None:
    """Check all sources; no row is read.

    Raises:
      UserError: a source is missing or has changed.
    """
    # Remote sources need a request each, hence the threads.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda source: check_source(source, dataset), dataset.sources))


def check_source(source: Source, dataset: Dataset) -> None:
    """Check one source of a dataset.

    Raises:
      UserError: it is missing, has changed or never had images.
    """
    if source.kind == "features":
        raise UserError(
            f"{dataset.path} was imported as features and has no images; to embed them, index the images as a dataset"
        )
    try:
        size, etag = size_and_etag(source.path)
    except UserError as error:
        raise UserError(f"source {source.path} of {dataset.path}: {error}; restore it") from None
    if size != source.bytes:
        raise UserError(
            f"source {source.path} has {size} bytes, but had {source.bytes} when it was indexed; restore it"
        )
    if etag != source.etag:
        raise UserError(
            f"source {source.path} is another file than when it was indexed (its ETag changed); restore it"
        )
    if source.images and not is_url(source.images) and not is_directory(source.images):
        raise UserError(f"{source.images}, the images of {source.path}, is missing; restore it")
