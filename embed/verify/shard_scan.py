"""Check the features of one shard: checksums, digest, NaN, zero and repeated rows.

Repeats are searched within a shard. Equal images have equal features, so some repeats are normal in any collection
from the web and are only a note. Since rows are shuffled, `_MAX_RUN` equal neighbours, or more than half of a block
being equal, mean that something other than the images was embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import BLOCK, decode_block
from lit_fast.data.features import Features, Manifest
from lit_fast.data.shards import tensorstore_reason
from lit_fast.embed.verify.findings import Finding, some
from lit_fast.errors import UserError

_MAX_RUN = 32
_MIN_VALID = 64  # blocks with fewer valid rows are not checked for equal halves


@dataclass
class ShardScan:
    """Properties of the rows of a shard; positions are relative to its first row."""

    digest: str
    hashes: np.ndarray  # uint64 [rows]
    finite: np.ndarray  # bool [rows]
    zero: np.ndarray  # bool [rows]
    unreadable: list[int] = field(default_factory=list)  # first rows of blocks
    reason: str = ""  # of the first unreadable block


def scan_shard(array: ts.TensorStore, manifest: Manifest) -> ShardScan:
    """Read all blocks of a shard; TensorStore compares the checksums."""
    rows, hasher = manifest.rows, hashlib.blake2b(digest_size=16)
    scan = ShardScan("", np.zeros(rows, np.uint64), np.ones(rows, bool), np.zeros(rows, bool))
    for lo in range(0, rows, BLOCK):
        hi = min(lo + BLOCK, rows)
        try:
            block = array[manifest.first + lo : manifest.first + hi].read().result()
        except ValueError as error:
            scan.unreadable.append(lo)
            scan.reason = scan.reason or tensorstore_reason(error)
            continue
        hasher.update(np.ascontiguousarray(block).view(np.uint8).data)
        bits = block.view(np.uint16)
        scan.finite[lo:hi] = ((bits & 0x7F80) != 0x7F80).all(axis=1)
        scan.zero[lo:hi] = ~(bits & 0x7FFF).any(axis=1)
        scan.hashes[lo:hi] = row_hashes(bits)
    scan.digest = hasher.hexdigest()
    return scan


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


def check_scan(features: Features, manifest: Manifest, scan: ShardScan, remedy: str) -> Iterator[Finding]:
    """Yield the findings on a scanned shard; `remedy` is that for damage."""
    part, shard, first = f"features {features.tower}", manifest.shard, manifest.first
    invalid = np.zeros(manifest.rows, bool)
    invalid[[r - first for r in manifest.invalid]] = True
    readable = np.ones(manifest.rows, bool)
    for lo in scan.unreadable:
        readable[lo : lo + BLOCK] = False
    if scan.unreadable:
        blocks = some(first + lo for lo in scan.unreadable)
        what = f"cannot be read, the blocks from row {blocks}: {scan.reason}"
        yield Finding(part, what, remedy, shard)
    elif manifest.features and scan.digest != manifest.features:
        what = "does not hold the features that its manifest was written for"
        yield Finding(part, what, remedy, shard)
    for what, which in (
        ("NaN or infinite", ~scan.finite),
        ("zero and not marked invalid", scan.zero & ~invalid),
        ("marked invalid and not zero", ~scan.zero & invalid),
    ):
        rows = (np.flatnonzero(which & readable) + first).tolist()
        if rows:
            yield Finding(part, f"{'row' if len(rows) == 1 else 'rows'} {some(rows)}: {what}", remedy, shard)
    yield from _check_repeats(features, manifest, scan, readable & ~invalid & ~scan.zero, remedy)


def _check_repeats(
    features: Features, manifest: Manifest, scan: ShardScan, valid: np.ndarray, remedy: str
) -> Iterator[Finding]:
    part, shard, first = f"features {features.tower}", manifest.shard, manifest.first
    positions = np.flatnonzero(valid)
    hashes = scan.hashes[positions]
    ends = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True))
    lengths = np.diff(ends, prepend=-1)
    if len(lengths) and lengths.max() >= _MAX_RUN:
        last = ends[lengths.argmax()]
        span = f"{first + positions[last - lengths.max() + 1]:,} to {first + positions[last]:,}"
        yield Finding(part, f"rows {span} all have the same features", remedy, shard)
    for lo in range(0, manifest.rows, BLOCK):
        block = hashes[(positions >= lo) & (positions < lo + BLOCK)]
        most = np.unique(block, return_counts=True)[1].max(initial=0)
        if len(block) >= _MIN_VALID and most > len(block) / 2:
            what = f"{most:,} of {len(block):,} rows from row {first + lo:,} on have the same features"
            yield Finding(part, what, remedy, shard)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated = positions[counts[inverse] > 1]
    if len(repeated):
        keys = some(_keys(features, (first + repeated[:6]).tolist()))
        what = (
            f"{len(repeated):,} rows have the same features as another row, as equal images do (keys {keys})"
        )
        yield Finding(part, what, shard=shard, wrong=False)


def _keys(features: Features, rows: list[int]) -> list[str]:
    reader = features.dataset.index_reader()
    try:
        blocks = {b: decode_block(reader.read(b)).keys for b in {r // BLOCK for r in rows}}
        return [blocks[r // BLOCK][r % BLOCK] for r in rows]
    except (UserError, ValueError, TypeError, IndexError):  # a finding of its own
        return [f"of row {r:,}" for r in rows]
