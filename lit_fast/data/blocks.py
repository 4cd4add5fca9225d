"""Whole blocks of a feature store, read from the shard files straight into memory.

TensorStore reads any part of any array, and allocates and copies every block once more on the way. The stream
reads whole blocks and nothing else, so it reads them here: all of it takes less processor time than TensorStore
for the bytes alone (`benchmarks/README.md`).

A shard file is its blocks, each of `1024 * views * width` little-endian bfloat16 and their crc32c, in any
order, and then the index: offset and length of every block as uint64, and the crc32c of the index (zarr
specification, "sharding_indexed").
"""

from __future__ import annotations

import os

import google_crc32c
import numpy as np

from lit_fast.data.dataset import BLOCK, SHARD
from lit_fast.data.features import Features, read_error

_INDEX = 16 * (SHARD // BLOCK)


def read_block(features: Features, block: int, out: np.ndarray) -> None:
    """Read one block into `out`, bfloat16 `[1024, views * width]`, contiguous; from any thread.

    Nothing is kept open or remembered, so a shard that is mended meanwhile is read as it is now. Of a short
    last block the rows beyond the dataset are zero.

    Raises:
      UserError: the shard is missing or damaged.
    """
    path = features.shard_path(block * BLOCK // SHARD)
    try:
        _read(path, block % (SHARD // BLOCK), out.reshape(-1).view(np.uint8))
    except (OSError, ValueError) as error:
        first = block * BLOCK
        rows = f"rows {first} to {min(first + BLOCK, features.dataset.rows) - 1}"
        raise read_error(features.path, ValueError(f"{rows}: {error}")) from None


def _read(path: str, number: int, out: np.ndarray) -> None:
    """Block `number` of a shard file into uint8 `out`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(descriptor).st_size - _INDEX - 4
        if end < 0:
            raise ValueError(f"{path} is too short for an index")
        index = np.empty(_INDEX, np.uint8)
        _read_at(path, descriptor, end, index)
        offset, length = (int(value) for value in index.view("<u8")[2 * number : 2 * number + 2])
        if length != len(out) + 4 or offset + length > end:  # an absent block has 2^64 - 1 for both
            raise ValueError(f"{path} has no whole block {number}")
        _read_at(path, descriptor, offset, out)
    finally:
        os.close(descriptor)


def _read_at(path: str, descriptor: int, offset: int, out: np.ndarray) -> None:
    """Fill uint8 `out` from a place in the file and compare the crc32c that follows."""
    told = np.empty(4, np.uint8)
    size = len(out) + 4
    done = os.preadv(descriptor, [out.data, told.data], offset)
    while done < size:  # a signal or the kernel's limit of 2 GB
        rest = [out[done:].data, told.data] if done < len(out) else [told[done - len(out) :].data]
        more = os.preadv(descriptor, rest, offset + done)
        if not more:
            raise ValueError(f"{path} ends early")
        done += more
    if google_crc32c.value(out) != int(told.view("<u4")[0]):
        raise ValueError(f"{path} has the wrong crc32c in the {size} bytes from {offset}")
