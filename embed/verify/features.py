"""Check and repair the features of one tower: manifests, stored bytes, sampled rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from lit_fast.data.features import Features, Manifest, tower_options
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.locks import lock_shard
from lit_fast.embed.shard_writer import remove_journal
from lit_fast.embed.verify.findings import Finding, finish_remedy, repair_remedy, some
from lit_fast.embed.verify.sample import open_stored_tower, verify_sample
from lit_fast.embed.verify.shard_scan import scan_shard
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, remove
from lit_fast.storage.machine import cpu_count
from lit_fast.storage.paths import join
from lit_fast.utils.progress import Progress


def verify_features(features: Features, shards: Iterable[int], sample: int) -> Iterator[Finding]:
    """Yield the findings on some shards; the memory is that of one block per thread.

    Args:
      sample: number of rows of all shards to embed again.
    """
    part = f"features {features.tower}"
    manifests: list[Manifest] = []
    has_grown = False
    for shard in shards:
        try:
            manifest = features.manifest(shard)
        except UserError as error:
            if exists(features.manifest_path(shard)):
                yield Finding(part, str(error), shard=shard)
            else:
                yield Finding(part, "is not there (it has no manifest)", finish_remedy(features), shard)
            continue
        has_grown |= manifest.rows < features.shard_rows(shard)
        if problem := _check_manifest(features, manifest):
            yield Finding(part, *problem, shard)
        else:
            manifests.append(manifest)
    try:
        array = features.array()
    except UserError as error:
        if not has_grown:  # an array of fewer rows is no second finding
            yield Finding(part, error.problem, repair_remedy(features))
        return
    readable: list[Manifest] = []
    progress = Progress(f"verify {features.tower}", sum(m.rows for m in manifests), "rows")
    with ThreadPoolExecutor(min(4, cpu_count()), thread_name_prefix="verify") as pool:
        scans = pool.map(lambda manifest: scan_shard(features, array, manifest), manifests)
        for manifest, (findings, is_readable) in zip(manifests, scans, strict=True):
            yield from findings
            progress.advance(manifest.rows)
            if is_readable:
                readable.append(manifest)
    progress.close()
    if sample and readable:
        yield from verify_sample(features, array, readable, sample)


def repair_features(features: Features, wrong: Sequence[Finding], sample: int) -> Iterator[Finding]:
    """Embed the shards of findings again, and yield the findings of a second check.

    The manifest is deleted first, so that a shard under repair never counts as finished.

    Raises:
      UserError: the tower's weights or the images are missing, or make other vectors than the store's.
    """
    if "imported" in features.provenance:
        raise UserError(
            f"{features.path} was imported and cannot be embedded here; {repair_remedy(features)}"
        )
    check_sources(features.dataset)
    tower = open_stored_tower(features)
    if isinstance(tower, Finding):
        raise UserError(f"{features.path} cannot be repaired: {tower.what}; {tower.remedy}")
    shards = sorted({f.shard for f in wrong if f.shard is not None})
    has_wrong_metadata = any(f.shard is None for f in wrong)
    for shard in shards:
        with lock_shard(features, shard):
            remove(features.manifest_path(shard))
            remove_journal(features, shard)
            remove(features.shard_path(shard))  # TensorStore would read the end of a short one
    if has_wrong_metadata:
        try:
            features.array(create=True)
        except UserError:  # zarr.json has no information that tower.json and the dataset lack
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
    every = range(features.dataset.shards)
    yield from verify_features(features, every if has_wrong_metadata else shards, sample)


def _check_manifest(features: Features, manifest: Manifest) -> tuple[str, str] | None:
    """Return the problem of a manifest and its remedy, None if there is none."""
    rows, keys = features.shard_rows(manifest.shard), features.dataset.shard_keys[manifest.shard]
    path = features.manifest_path(manifest.shard)
    if manifest.tower != features.identity:
        return f"{path} names another tower than tower.json", repair_remedy(features)
    if manifest.rows < rows:
        problem = f"has {manifest.rows:,} of {rows:,} rows, since the dataset has grown"
        return problem, finish_remedy(features)
    if manifest.keys != keys or manifest.rows != rows:
        return f"{path} is of other rows than the dataset has", repair_remedy(features)
    outside = [r for r in manifest.invalid if not manifest.first <= r < manifest.first + rows]
    if outside:
        return f"{path} has invalid rows of other shards ({some(outside)})", repair_remedy(features)
    return None
