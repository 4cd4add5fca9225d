"""Read the image file of a row, whatever kind of source it is in. Thread-safe."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple
from urllib.parse import quote

from lit_fast.data.dataset import BLOCK, Block, Dataset, Source, compact_block
from lit_fast.data.images.decode import MAX_IMAGE, ChangedImageError, ImageError
from lit_fast.data.images.fingerprint import image_checksum
from lit_fast.data.images.noise import DEFAULT_SIZE, noise_image
from lit_fast.data.images.parquet import CACHED_BYTES, ParquetImages
from lit_fast.data.images.sources import check_source
from lit_fast.data.images.tf_examples import ExampleImages, image_of_example
from lit_fast.errors import UserError, is_shortage, os_reason
from lit_fast.storage.files import file_status, is_directory, read_range, read_whole
from lit_fast.storage.paths import is_url, join

_SAMPLE = 64  # images that `check_images` reads


class ChangedSourceError(UserError):
    """A file that holds many images has others than when it was indexed."""


class ImageReader:
    """Reads the encoded images of a dataset by row, from any thread.

    Args:
      dataset: the dataset.
      noise_size: side in pixels of the images of noise sources.
      cached_blocks: blocks of the index that are held in memory, about 40 kB each and the keys; rows in random order
        need those of all of them.
      cached_bytes: of decoded row groups of parquet files.
    """

    def __init__(
        self,
        dataset: Dataset,
        noise_size: int = DEFAULT_SIZE,
        cached_blocks: int = 8,
        cached_bytes: int = CACHED_BYTES,
    ) -> None:
        self._dataset, self._noise_size = dataset, noise_size
        self._parquet, self._examples = ParquetImages(dataset.path, cached_bytes), ExampleImages()
        index = dataset.index_reader()
        self._block = lru_cache(maxsize=cached_blocks)(lambda number: compact_block(index.read(number)))
        # A source that does not answer is asked once, not once per image.
        self._is_intact = cache(self._check_source)

    def locate(self, row: int) -> tuple[Block, int]:
        """Return the index block of a row and the row's position in it."""
        return self._block(row // BLOCK), row % BLOCK

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row.

        Raises:
          UserError: the source cannot be read or has changed.
          ImageError: this image alone cannot be read, or its file has changed.
        """
        block, i = self.locate(row)
        source, check = self._dataset.sources[block.sources[i]], block.check(i)
        size = block.sizes[i] if source.kind in ("tar", "folder") else 0
        data = self._read(block, i)
        if (check and image_checksum(data) != check) or (size and len(data) != size):
            if source.kind == "folder":
                raise ChangedImageError("the image file has changed since it was indexed")
            raise _changed(source, block.keys[i])
        return data

    def _read(self, block: Block, i: int) -> bytes:
        """Return the image of row `i` of a block as it is in the source now."""
        source, offset, size = self._dataset.sources[block.sources[i]], block.offsets[i], block.sizes[i]
        try:
            match source.kind:
                case "tar":
                    return _read_byte_range(source.path, offset, size)
                case "folder":
                    return _read_folder_image(source, block.keys[i])
                case "parquet":
                    return self._parquet.read(source, group=offset, row=size)
                case "array_record":
                    return self._examples.read(source, record=offset)
                case "tfrecord":
                    record = _read_byte_range(source.path, offset, size)
                    try:
                        return image_of_example(record, source.image)
                    except ImageError:  # it had one when it was indexed
                        raise _changed(source, block.keys[i]) from None
                case "noise":
                    return noise_image(offset, self._noise_size)
                case "features":
                    raise UserError(
                        f"{self._dataset.path} was imported as features and has no images; index the images "
                        "as a dataset"
                    )
        except OSError as error:
            if is_shortage(error):
                raise
            raise UserError(
                f"{error.filename or source.path} cannot be read: {os_reason(error)}; restore it, then rerun the same "
                "the command"
            ) from None
        raise UserError(f"{self._dataset.path} has a source of unknown kind {source.kind!r}; update lit-fast")

    def read_or_none(self, row: int) -> bytes | None:
        """Return the encoded image of a row, or None if it or its source is missing, damaged or changed."""
        block, i = self.locate(row)
        if not self._is_intact(block.sources[i]):
            return None
        try:
            return self.read(row)
        except (ImageError, UserError):
            return None

    def _check_source(self, number: int) -> bool:
        try:
            check_source(self._dataset.sources[number], self._dataset.path)
        except (UserError, IndexError):  # rows that were imported without images have no source
            return False
        return True


class ImageSample(NamedTuple):
    """What `sample_images` found."""

    read: int  # images that were compared or looked for
    changed: list[str]  # keys of rows whose image file is another than the indexed one
    missing: list[str]  # keys of rows whose image file cannot be read


def sample_images(dataset: Dataset, sample: int = 64, *, archives: bool = False) -> ImageSample:
    """Compare the images of evenly spaced rows with those that were indexed.

    Args:
      dataset: the dataset.
      sample: number of rows.
      archives: compare also images in files that hold many; without, only those in files of their own.

    Raises:
      ChangedSourceError: a file that holds many images has changed.
      UserError: a source cannot be read.
    """
    reader, found = ImageReader(dataset), ImageSample(0, [], [])
    for row in sorted({dataset.rows * i // sample for i in range(sample)}):
        block, i = reader.locate(row)
        if not block.check(i) or not (archives or dataset.sources[block.sources[i]].kind == "folder"):
            continue
        found = found._replace(read=found.read + 1)
        try:
            reader.read(row)
        except ChangedImageError:
            found.changed.append(block.keys[i])
        except ImageError:
            found.missing.append(block.keys[i])
    return found


def check_images(dataset: Dataset) -> None:
    """Compare a sample of the image files; a missing file is an unreadable row, if others are there.

    Raises:
      UserError: an image has changed, or none of the sample is there.
    """
    found = sample_images(dataset, _SAMPLE)
    if found.changed:
        raise UserError(
            f"{len(found.changed)} of {found.read} sampled images of {dataset.path} have changed since they were "
            f"indexed (first: {found.changed[0]!a}); restore them, or index the sources as a new dataset"
        )
    if len(found.missing) == min(_SAMPLE, dataset.rows):
        raise UserError(
            f"none of {found.read} sampled images of {dataset.path} can be read (first: {found.missing[0]!a}); restore "
            f"them, or if they have moved: lit-fast index --relocate OLD=NEW {dataset.path}"
        )


def _changed(source: Source, key: str) -> ChangedSourceError:
    return ChangedSourceError(
        f"source {source.path} has changed since it was indexed: the image of {key!a} is another; restore it, or "
        "index the sources as a new dataset"
    )


def _read_byte_range(location: str, offset: int, size: int) -> bytes:
    data = read_range(location, offset, offset + size)
    if len(data) < size:
        raise UserError(f"{location} is shorter than when it was indexed; restore it")
    return data


def _read_folder_image(source: Source, key: str) -> bytes:
    """Return the file `key` of a folder. If the file is missing, raise ImageError; if the folder is, UserError."""
    if is_url(source.images):
        name = quote(key) if source.images.startswith("http") else key
        data = read_whole(f"{source.images}/{name}", MAX_IMAGE)
        if data is None:
            raise ImageError("image file not found")
        return data
    location = join(source.images, key)
    try:
        status = file_status(location)  # before opening: a pipe would block
        if not status.is_file:
            raise ImageError("not a regular file")
        if status.size > MAX_IMAGE:
            raise ImageError("image file above 256 MiB")
        return read_range(location, 0, status.size)
    except (FileNotFoundError, NotADirectoryError):
        if not is_directory(source.images):
            raise UserError(f"{source.images}, the images of {source.path}, is missing; restore it") from None
        raise ImageError("image file not found") from None
