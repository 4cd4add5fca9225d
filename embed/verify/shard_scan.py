"""Check the features of one shard: checksums, digest, NaN, zero and repeated rows.

Repeats are searched within a shard. Equal images have equal features, so some repeats are normal in any collection
from the web and are only a note. Since rows are shuffled, `_MAX_RUN` equal neighbours, or more than half of a block
being equal, mean that something other than the images was embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import BLOCK, decode_block
from lit_fast.data.features import Features, Manifest
from lit_fast.data.shards import tensorstore_reason
from lit_fast.embed.verify.findings import Finding, repair_remedy, some
from lit_fast.errors import UserError

_MAX_RUN = 32
_MIN_VALID = 64  # blocks with fewer valid rows are not checked for equal halves


def scan_shard(features: Features, array: ts.TensorStore, manifest: Manifest) -> tuple[list[Finding], bool]:
    """Read all blocks of a shard; TensorStore compares the checksums.

    Args:
      array: `features.array()`.

    Returns:
      The findings, and whether every block can be read.
    """
    rows, first, hasher = manifest.rows, manifest.first, hashlib.blake2b(digest_size=16)
    hashes = np.zeros(rows, np.uint64)
    finite, readable = np.ones((2, rows), bool)
    zero, invalid = np.zeros((2, rows), bool)
    invalid[[r - first for r in manifest.invalid]] = True
    unreadable: list[int] = []  # first rows of blocks
    reason = ""  # of the first unreadable block
    for lo in range(0, rows, BLOCK):
        hi = min(lo + BLOCK, rows)
        try:
            block = array[first + lo : first + hi].read().result()
        except ValueError as error:
            unreadable.append(first + lo)
            readable[lo:hi] = False
            reason = reason or tensorstore_reason(error)
            continue
        hasher.update(np.ascontiguousarray(block).view(np.uint8).data)
        bits = block.view(np.uint16)
        finite[lo:hi] = ((bits & 0x7F80) != 0x7F80).all(axis=1)
        zero[lo:hi] = ~(bits & 0x7FFF).any(axis=1)
        hashes[lo:hi] = row_hashes(bits)
    damages = []
    if unreadable:
        damages.append(f"cannot be read, the blocks from row {some(unreadable)}: {reason}")
    elif manifest.features and hasher.hexdigest() != manifest.features:
        damages.append("does not hold the features that its manifest was written for")
    for what, which in (
        ("NaN or infinite", ~finite),
        ("zero and not marked invalid", zero & ~invalid),
        ("marked invalid and not zero", ~zero & invalid),
    ):
        wrong = (np.flatnonzero(which & readable) + first).tolist()
        if wrong:
            damages.append(f"{'row' if len(wrong) == 1 else 'rows'} {some(wrong)}: {what}")
    valid = np.flatnonzero(readable & ~invalid & ~zero)
    damages += _equal_neighbours(first + valid, hashes[valid])
    part, remedy = f"features {features.tower}", repair_remedy(features)
    findings = [Finding(part, damage, remedy, manifest.shard) for damage in damages]
    _, inverse, counts = np.unique(hashes[valid], return_inverse=True, return_counts=True)
    repeated = first + valid[counts[inverse] > 1]
    if len(repeated):
        keys = some(_keys(features, repeated[:6].tolist()))
        note = (
            f"{len(repeated):,} rows have the same features as another row, as equal images do (keys {keys})"
        )
        findings.append(Finding(part, note, shard=manifest.shard, wrong=False))
    return findings, not unreadable


def row_hashes(bits: np.ndarray) -> np.ndarray:
    """Hash rows: the sum over a row of splitmix64 of each word and its position.

    Args:
      bits: uint16 `[n, width]`.

    Returns:
      uint64 `[n]`.
    """
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4)))
    words: np.ndarray = np.ascontiguousarray(padded).view(np.uint64)
    position = np.arange(1, words.shape[1] + 1, dtype=np.uint64)
    x = words + position * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).sum(axis=1, dtype=np.uint64)


def _equal_neighbours(rows: np.ndarray, hashes: np.ndarray) -> Iterator[str]:
    """Yield the damage that equal features of many neighbours show.

    Args:
      rows: int `[n]`, ascending rows of the dataset.
      hashes: uint64 `[n]`, the hashes of their features.
    """
    ends = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True))
    lengths = np.diff(ends, prepend=-1)
    if len(lengths) and lengths.max() >= _MAX_RUN:
        last = ends[lengths.argmax()]
        yield f"rows {rows[last - lengths.max() + 1]:,} to {rows[last]:,} all have the same features"
    for number in np.unique(rows // BLOCK):
        block = hashes[rows // BLOCK == number]
        most = np.unique(block, return_counts=True)[1].max()
        if len(block) >= _MIN_VALID and most > len(block) / 2:
            yield f"{most:,} of {len(block):,} rows from row {number * BLOCK:,} on have the same features"


def _keys(features: Features, rows: list[int]) -> list[str]:
    dataset = features.dataset
    reader = dataset.index_reader()
    try:
        blocks = {b: decode_block(reader.read(b)) for b in {r // BLOCK for r in rows}}
        return [dataset.row_name(blocks[r // BLOCK], r % BLOCK) for r in rows]
    except (UserError, ValueError, TypeError, IndexError):  # a finding of its own
        return [f"of row {r:,}" for r in rows]
