"""The shard files of a feature store, read block by block.

The features are a zarr3 array (specification: "sharding_indexed") that any zarr library reads. A shard file holds its
blocks in any order, each 1024 rows of little-endian bfloat16 followed by their crc32c, and then the index: offset and
length of every block as uint64, followed by the crc32c of the index. The stream reads whole blocks only, straight into
its own memory; TensorStore allocates and copies every block once more and takes more processor time.
"""

from __future__ import annotations

import re
from typing import Any

import google_crc32c
import numpy as np

from lit_fast.data.dataset import BLOCK, SHARD
from lit_fast.errors import UserError, first_line, is_shortage
from lit_fast.storage.files import read_into, read_tail
from lit_fast.storage.paths import is_bucket, join, parent

_BLOCKS = SHARD // BLOCK
_CHECKSUM = 4  # bytes
_RUN_BYTES = 8 << 20  # of one request to a bucket where whole shards are needed


def array_metadata(width: int) -> dict[str, Any]:
    """Return the zarr metadata of a `[rows, width]` bfloat16 array without its shape."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "data_type": "bfloat16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD, width]}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [BLOCK, width],
                    "codecs": [little, {"name": "crc32c"}],
                    "index_codecs": [little, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
    }


def read_threads(location: str) -> int:
    """Return the number of concurrent reads that keep a local disk, or the requests to a bucket, busy."""
    return 32 if is_bucket(location) else 8


def run_blocks(location: str, width: int) -> int:
    """Return the number of blocks of `width` values a row that are read at once where whole shards are needed."""
    if not is_bucket(location):
        return 1
    return max(1, min(_BLOCKS, _RUN_BYTES // (2 * BLOCK * width)))


def shard_file(store: str, shard: int) -> str:
    """Return the location of a shard of the array in directory `store`."""
    return join(store, "c", str(shard), "0")


class BlockReader:
    """Reads whole blocks of a feature store, from any thread.

    The index of every shard is kept, 1 KiB each, so that a block is one read. After a damaged read the index is read
    again, because the shard may have been replaced meanwhile.

    Args:
      store: the directory of the array.
      rows: rows of the array.
    """

    def __init__(self, store: str, rows: int) -> None:
        self._store, self._rows = store, rows
        self._indices: dict[int, np.ndarray] = {}  # shard -> uint64 [blocks, 2]: offset, length

    def read(self, block: int, out: np.ndarray) -> None:
        """Read one block into `out`, contiguous bfloat16 `[1024, width]`; rows beyond the dataset become zero.

        Raises:
          UserError: the shard is missing or damaged.
        """
        shard, number = divmod(block, _BLOCKS)
        data = out.reshape(1, -1).view(np.uint8)
        known = shard in self._indices
        try:
            try:
                self._read(shard, number, data)
            except ValueError:
                self._indices.pop(shard, None)
                if not known:
                    raise
                self._read(shard, number, data)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and is_shortage(error):
                raise
            first = block * BLOCK
            last = min(first + BLOCK, self._rows) - 1
            raise read_error(self._store, ValueError(f"rows {first} to {last}: {error}")) from None

    def read_run(self, block: int, out: np.ndarray) -> None:
        """Read consecutive blocks of one shard into `out`, contiguous bfloat16 `[blocks, 1024, width]`.

        It is one read if they follow each other in the file, as in a shard that was written at once.

        Raises:
          UserError: the shard is missing or damaged.
        """
        shard, first = divmod(block, _BLOCKS)
        try:
            self._read(shard, first, out.reshape(len(out), -1).view(np.uint8))
        except (OSError, ValueError):
            for number, buffer in enumerate(out, block):
                self.read(number, buffer)

    def _read(self, shard: int, first: int, out: np.ndarray) -> None:
        """Read blocks that follow each other in a file into `out`, uint8 `[blocks, bytes]`."""
        file = shard_file(self._store, shard)
        if shard not in self._indices:
            self._indices[shard] = _read_index(file)
        stored = self._indices[shard][first : first + len(out)].tolist()
        start, length = stored[0][0], out.shape[1] + _CHECKSUM
        for i, (offset, stored_length) in enumerate(stored):
            # Both are 2^64 - 1 for an absent block.
            if stored_length != length or offset >= 1 << 62 or offset != start + i * length:
                raise ValueError(f"{file} has no whole block {first + i}")
        checksums = np.empty((len(out), _CHECKSUM), np.uint8)
        read_into(file, start, *(part.data for pair in zip(out, checksums, strict=True) for part in pair))
        for i, checksum in enumerate(checksums.view("<u4")[:, 0].tolist()):
            if google_crc32c.value(out[i]) != checksum:
                raise ValueError(
                    f"{file} has the wrong crc32c in the {length} bytes from {start + i * length}"
                )


def _read_index(file: str) -> np.ndarray:
    """Return the offset and length of every block of a shard, uint64 `[blocks, 2]`."""
    data = np.frombuffer(read_tail(file, 16 * _BLOCKS + _CHECKSUM), np.uint8)
    index, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    if google_crc32c.value(index) != int(checksum.copy().view("<u4")[0]):
        raise ValueError(f"{file} has the wrong crc32c in its index")
    return index.view("<u8").reshape(_BLOCKS, 2)


def read_error(store: str, error: Exception) -> UserError:
    """Return the error of a failed read from a feature store, with the command that repairs it."""
    return UserError(
        f"{store} cannot be read, a shard is missing or damaged: {tensorstore_reason(error)}; repair it with: "
        f"lit-fast verify {parent(parent(store))} --repair"
    )


def tensorstore_reason(error: Exception) -> str:
    """Return the first line of a TensorStore error without the details in brackets.

    Of an error of the operating system, the first file and the reason.
    """
    text = first_line(error, 1000)
    system = re.search(r'"(/[^"]+)".*: ([^:]+) \[os_error_code', text)
    return f"{system[1]}: {system[2]}" if system else re.sub(r" \[\w+=.*", "", text)
