"""Checks one tower's features: what is stored is what was written, and what the tower makes.

Duplicates are looked for within a shard. Equal images give equal features, so that some are normal in any
collection from the web and only noted. Rows are shuffled, so that a run of `_RUN` equal neighbours, or more
than half of a block being equal, means that something other than the pictures was embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import BLOCK, SHARD, decode_block
from lit_fast.data.features import Features, Manifest, embed_command, first_line, first_view, tower_options
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.images.reader import check_sources
from lit_fast.embed.extract import embed_dataset, journal_path
from lit_fast.embed.pipeline import Images
from lit_fast.embed.verify.findings import Finding, some
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, remove
from lit_fast.storage.paths import join
from lit_fast.towers.embed import compile_tower, default_batch_size, open_tower
from lit_fast.towers.tower import Tower
from lit_fast.utils.progress import Progress
from lit_fast.utils.system import cpu_count

_RUN = 32
_FEW = 64  # a block with fewer valid rows says nothing about shares

# Smallest cosine between a stored vector and the same one made anew, by the precision it was made in.
# Storing rounds to 8 bits: 1 - 3e-6. In float32 other hardware adds less than that. In bfloat16 every layer
# rounds, and otherwise on other hardware: of a ViT-Ti/16 and real photos: 1 - 3e-4, other photos at most 0.85.
_COSINE = {"float32": 0.9999, "bfloat16": 0.99}


def verify_features(features: Features, shards: Iterable[int], sample: int) -> Iterator[Finding]:
    """Findings on some shards of a store; memory for one block per thread."""
    part, again = f"features {features.tower}", _again(features)
    manifests: list[Manifest] = []
    grown = False
    readable: list[Manifest] = []
    for shard in shards:
        try:
            manifest = features.manifest(shard)
        except UserError as error:
            if exists(features.manifest_path(shard)):
                yield Finding(part, str(error), shard=shard)
            else:
                yield Finding(part, "is not there (it has no manifest)", again, shard)
            continue
        wrong = _wrong_manifest(features, manifest)
        grown |= manifest.rows < features.shard_rows(shard)
        if wrong:
            yield Finding(part, *wrong, shard)
        else:
            manifests.append(manifest)
    try:
        array = features.array()
    except UserError as error:
        if not grown:  # an array of fewer rows is no second finding
            yield Finding(part, str(error), _repair(features))
        return
    progress = Progress(f"verify {features.tower}", sum(m.rows for m in manifests), "rows")
    with ThreadPoolExecutor(min(4, cpu_count()), thread_name_prefix="verify") as pool:
        looks = pool.map(lambda m: _look(array, m), manifests)
        for manifest, look in zip(manifests, looks, strict=True):
            yield from _judge(features, manifest, look)
            progress.advance(manifest.rows)
            if not look.unreadable:
                readable.append(manifest)
    progress.close()
    if sample and readable:
        yield from _verify_sample(features, array, readable, sample)


def repair_features(features: Features, bad: Sequence[Finding], sample: int) -> Iterator[Finding]:
    """Embed the shards of the bad findings anew; findings of a second look at them.

    The manifest goes first, so that a shard which is being mended is never taken for a good one.

    Raises:
      UserError: the tower's weights or the images are not there, or make other vectors than the store's.
    """
    if "imported" in features.provenance:
        raise UserError(f"{features.path} was imported, which cannot be repeated here; {_repair(features)}")
    check_sources(features.dataset)
    tower = _load(features)
    if isinstance(tower, Finding):
        raise UserError(f"{features.path} cannot be mended: {tower.what}; {tower.remedy}")
    every = range(features.dataset.shards)
    shards = sorted({f.shard for f in bad if f.shard is not None})
    metadata = any(f.shard is None for f in bad)
    for shard in shards:
        remove(features.manifest_path(shard))
        journal_path(features, shard).unlink(missing_ok=True)
        remove(features.shard_path(shard))  # TensorStore would read the end of a short one
    if metadata:
        try:
            features.array(create=True)
        except UserError:  # zarr.json holds nothing that tower.json and the dataset do not say
            remove(join(features.path, "zarr.json"))
            features.array(create=True)
    embed_dataset(
        features.dataset.path,
        features.provenance["source"],
        name=features.tower,
        views=features.views,
        dtype=features.provenance["dtype"],
        share=(0, 1),
        **tower_options(features.provenance),
    )
    yield from verify_features(features, every if metadata else shards, sample)


# --- manifests


def _wrong_manifest(features: Features, manifest: Manifest) -> tuple[str, str] | None:
    """What is wrong with a manifest, and the remedy."""
    rows, keys = features.shard_rows(manifest.shard), features.dataset.shard_keys[manifest.shard]
    path = features.manifest_path(manifest.shard)
    if manifest.tower != features.identity:
        return f"{path} names another tower than tower.json", _repair(features)
    if manifest.rows < rows:
        what = f"has {manifest.rows:,} of {rows:,} rows, the dataset has grown"
        return what, _again(features)
    if manifest.keys != keys or manifest.rows != rows:
        return f"{path} is of other rows than the dataset has", _repair(features)
    outside = [r for r in manifest.invalid if not manifest.first <= r < manifest.first + rows]
    if outside:
        return f"{path} has invalid rows of other shards ({some(outside)})", _repair(features)
    return None


def _repair(features: Features) -> str:
    if "imported" in features.provenance:
        return f"delete {features.path} and {_again(features)}"
    return f"mend it with: lit-fast verify {features.dataset.path} --tower {features.tower} --repair"


def _again(features: Features) -> str:
    return f"finish it with: {embed_command(features.dataset, features.provenance, features.tower)}"


# --- what is stored


@dataclass
class _Look:
    """What reading a shard once has shown; rows are counted from the shard's first."""

    digest: str
    hashes: np.ndarray  # uint64 [rows]
    finite: np.ndarray  # bool [rows]
    zero: np.ndarray  # bool [rows]
    unreadable: list[int] = field(default_factory=list)  # first rows of blocks
    reason: str = ""


def _look(array: ts.TensorStore, manifest: Manifest) -> _Look:
    rows, hasher = manifest.rows, hashlib.blake2b(digest_size=16)
    look = _Look("", np.zeros(rows, np.uint64), np.ones(rows, bool), np.zeros(rows, bool))
    for lo in range(0, rows, BLOCK):
        hi = min(lo + BLOCK, rows)
        try:
            block = array[manifest.first + lo : manifest.first + hi].read().result()
        except ValueError as error:  # TensorStore compares the checksums
            look.unreadable.append(lo)
            look.reason = look.reason or first_line(error)
            continue
        hasher.update(np.ascontiguousarray(block).view(np.uint8).data)
        bits = block.view(np.uint16)
        look.finite[lo:hi] = ((bits & 0x7F80) != 0x7F80).all(axis=1)
        look.zero[lo:hi] = ~(bits & 0x7FFF).any(axis=1)
        look.hashes[lo:hi] = row_hashes(bits)
    look.digest = hasher.hexdigest()
    return look


def row_hashes(bits: np.ndarray) -> np.ndarray:
    """A 64-bit hash per row of uint16 [n, width]: splitmix64 of each word at its place, summed."""
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4)))
    words: np.ndarray = np.ascontiguousarray(padded).view(np.uint64)
    place = np.arange(1, words.shape[1] + 1, dtype=np.uint64)
    x = words + place * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).sum(axis=1, dtype=np.uint64)


def _judge(features: Features, manifest: Manifest, look: _Look) -> Iterator[Finding]:
    part, shard, first = f"features {features.tower}", manifest.shard, manifest.first
    invalid = np.zeros(manifest.rows, bool)
    invalid[[r - first for r in manifest.invalid]] = True
    read = np.ones(manifest.rows, bool)
    for lo in look.unreadable:
        read[lo : lo + BLOCK] = False

    def rows(which: np.ndarray) -> str:
        found = (np.flatnonzero(which & read) + first).tolist()
        return f"{'row' if len(found) == 1 else 'rows'} {some(found)}" if len(found) else ""

    if look.unreadable:
        blocks = some(first + lo for lo in look.unreadable)
        what = f"cannot be read, the blocks from row {blocks}: {look.reason}"
        yield Finding(part, what, _repair(features), shard)
    elif manifest.features and look.digest != manifest.features:
        what = "does not hold the features that its manifest was written for"
        yield Finding(part, what, _repair(features), shard)
    for what, which in (
        ("NaN or infinite", ~look.finite),
        ("zero and not marked invalid", look.zero & ~invalid),
        ("marked invalid and not zero", ~look.zero & invalid),
    ):
        if named := rows(which):
            yield Finding(part, f"{named}: {what}", _repair(features), shard)
    yield from _duplicates(features, manifest, look, read & ~invalid & ~look.zero)


def _duplicates(features: Features, manifest: Manifest, look: _Look, valid: np.ndarray) -> Iterator[Finding]:
    part, shard, first = f"features {features.tower}", manifest.shard, manifest.first
    places = np.flatnonzero(valid)
    hashes = look.hashes[places]
    ends = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True))
    lengths = np.diff(ends, prepend=-1)
    if len(lengths) and lengths.max() >= _RUN:
        last = ends[lengths.argmax()]
        span = f"{first + places[last - lengths.max() + 1]:,} to {first + places[last]:,}"
        yield Finding(part, f"rows {span} all have the same features", _repair(features), shard)
    for lo in range(0, manifest.rows, BLOCK):
        block = hashes[(places >= lo) & (places < lo + BLOCK)]
        most = np.unique(block, return_counts=True)[1].max(initial=0)
        if len(block) >= _FEW and most > len(block) / 2:
            what = f"{most:,} of {len(block):,} rows from row {first + lo:,} on have the same features"
            yield Finding(part, what, _repair(features), shard)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    shared = places[counts[inverse] > 1]
    if len(shared):
        keys = some(_keys(features, (first + shared[:6]).tolist()))
        what = f"{len(shared):,} rows have the same features as another row, as equal images do (keys {keys})"
        yield Finding(part, what, shard=shard, wrong=False)


def _keys(features: Features, rows: list[int]) -> list[str]:
    reader = features.dataset.index_reader()
    try:
        blocks = {b: decode_block(reader.read(b)).keys for b in {r // BLOCK for r in rows}}
        return [blocks[r // BLOCK][r % BLOCK] for r in rows]
    except (UserError, ValueError, TypeError, IndexError):  # a finding of its own
        return [f"of row {r:,}" for r in rows]


# --- what the tower makes


def _load(features: Features) -> Tower | Finding:
    """The tower as tower.json says, or why it cannot be had."""
    part, told = f"features {features.tower}", features.provenance
    if "imported" in told:
        what = "no row was embedded anew: the features were imported, from a model that is not at hand"
        return Finding(part, what, wrong=False)
    try:
        tower = open_tower(told["source"], tower_options(told))
    except UserError as error:
        return Finding(
            part, f"no row was embedded anew: {error}", "give --sample 0 to do without", wrong=False
        )
    if tower.sha256 != told.get("sha256"):
        what = f"{told['source']} holds other weights than those that made the features"
        return Finding(part, what, f"restore the file with sha256 {told.get('sha256')}")
    if tower.provenance(told["dtype"])["identity"] != first_view(told):
        what = "this version of lit_fast makes other vectors of these weights than tower.json says"
        return Finding(part, what, "use the version that tower.json names, or embed under another --name")
    return tower


def _verify_sample(
    features: Features, array: ts.TensorStore, manifests: list[Manifest], sample: int
) -> Iterator[Finding]:
    """Embed evenly spaced rows anew and compare."""
    part = f"features {features.tower}"
    tower = _load(features)
    if isinstance(tower, Finding):
        yield tower
        return
    try:
        check_sources(features.dataset)
    except UserError as error:
        yield Finding(part, f"no row was embedded anew: {error}", wrong=False)
        return
    rows = _sampled(manifests, sample)
    limit = tower_options(features.provenance).get("max_pixels", MAX_PIXELS)
    images = Images(features.dataset, tower.preprocess, limit, features.views)
    run = compile_tower(tower, features.provenance["dtype"])
    devices = jax.local_device_count()
    size = max(1, default_batch_size() // features.views) * devices
    wrong: dict[int, list[tuple[int, str]]] = {}
    smallest, compared = 1.0, 0
    for lo in range(0, len(rows), size):
        chunk = rows[lo : lo + size]
        pixels = np.zeros((size, *images.shape), np.uint8)
        broken: dict[int, str] = {}
        try:
            for i, row in enumerate(chunk):
                broken |= images.fill(row, 1, pixels[i : i + 1])
        except UserError as error:  # an index record or a source that cannot be read
            yield Finding(
                part, f"row {row:,} and those after it were not embedded anew: {error}", wrong=False
            )
            break
        made = np.asarray(run(pixels.reshape(-1, *images.shape[1:])))
        made = made.reshape(size, features.views, features.width)[: len(chunk)]
        stored = np.stack([array[row].read().result() for row in chunk]).astype(np.float32)
        cosines = _cosine(made, stored.reshape(made.shape)).min(axis=1)
        compared += len(chunk)
        for row, cosine in zip(chunk, cosines.tolist(), strict=True):
            if row in broken:
                reason = f"its image cannot be decoded ({broken[row]})"
            elif not cosine >= _COSINE[features.provenance["dtype"]]:
                reason = f"cosine {cosine:.4f}"
            else:
                smallest = min(smallest, cosine)
                continue
            wrong.setdefault(row // SHARD, []).append((row, reason))
    for shard, found in sorted(wrong.items()):
        named = some(f"row {row:,}: {reason}" for row, reason in found)
        what = f"{len(found)} of the rows embedded anew are not what is stored ({named})"
        yield Finding(part, what, _repair(features), shard)
    if compared and not wrong:
        what = f"{compared} rows embedded anew, smallest cosine {smallest:.6f}"
        print(f"{part}: {what}")


def _sampled(manifests: list[Manifest], sample: int) -> list[int]:
    """Evenly spaced valid rows, at least one of every shard; the same ones every time."""
    rows: list[int] = []
    total = sum(m.rows for m in manifests)
    for manifest in manifests:
        valid = np.setdiff1d(np.arange(manifest.rows), [r - manifest.first for r in manifest.invalid])
        count = min(len(valid), max(1, round(sample * manifest.rows / total)))
        if count:
            places = ((np.arange(count) + 0.5) * len(valid) / count).astype(int)
            rows += (manifest.first + valid[places]).tolist()
    return rows


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines [n, views] of float32 [n, views, width]; 0 where one is zero, NaN where one is not finite."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=-1) / np.maximum(lengths, 1e-30)
