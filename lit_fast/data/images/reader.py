"""Read the image file of a row, whatever kind of source it is in. Thread-safe."""

from __future__ import annotations

from functools import cache, lru_cache

from lit_fast.data.dataset import BLOCK, Block, Dataset, decode_block
from lit_fast.data.images.byte_range import read_byte_range
from lit_fast.data.images.decode import ImageError
from lit_fast.data.images.folder import read_folder_image
from lit_fast.data.images.noise import DEFAULT_SIZE, noise_image
from lit_fast.data.images.parquet import ParquetImages
from lit_fast.data.images.sources import check_source
from lit_fast.data.images.tf_examples import ExampleImages
from lit_fast.errors import UserError


class ImageReader:
    """Reads the encoded images of a dataset by row, from any thread.

    The kind of a row's source, recorded when it was indexed, selects one of the modules beside this one.

    Args:
      dataset: the dataset.
      noise_size: side in pixels of the images of noise sources.
    """

    def __init__(self, dataset: Dataset, noise_size: int = DEFAULT_SIZE) -> None:
        self._dataset, self._noise_size = dataset, noise_size
        self._parquet, self._examples = ParquetImages(), ExampleImages()
        index = dataset.index_reader()
        self._block = lru_cache(maxsize=8)(lambda number: decode_block(index.read(number)))
        # A source that does not answer is asked once, not once per image.
        self._is_intact = cache(self._check_source)

    def locate(self, row: int) -> tuple[Block, int]:
        """Return the index block of a row and the row's position in it."""
        return self._block(row // BLOCK), row % BLOCK

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row.

        Raises:
          UserError: the source cannot be read or has changed.
          ImageError: this image alone cannot be read.
        """
        block, i = self.locate(row)
        source, offset, size = self._dataset.sources[block.sources[i]], block.offsets[i], block.sizes[i]
        try:
            match source.kind:
                case "tar":
                    return read_byte_range(source.path, offset, size)
                case "folder":
                    return read_folder_image(source, block.keys[i])
                case "parquet":
                    return self._parquet.read(source, group=offset, row=size)
                case "array_record":
                    return self._examples.read(source, record=offset)
                case "noise":
                    return noise_image(offset, self._noise_size)
                case "features":
                    raise UserError(
                        f"{self._dataset.path} was imported as features and has no images; index them"
                    )
        except OSError as error:
            raise UserError(
                f"{error.filename or source.path} cannot be read: {error.strerror or error}; restore it, then rerun "
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
            check_source(self._dataset.sources[number], self._dataset)
        except (UserError, IndexError):  # rows that were imported without images have no source
            return False
        return True
