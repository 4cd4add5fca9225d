"""`lit-fast embed`: compute the features of a frozen tower for all rows, once."""

from __future__ import annotations

import re

from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import Features, embed_command, with_views
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.images.reader import ImageReader, check_images
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.job import Job, embed_shards
from lit_fast.embed.locks import shard_lock_path
from lit_fast.errors import UserError, os_reason
from lit_fast.models.precision import fast_dtype
from lit_fast.runtime import process_rank
from lit_fast.storage.files import exists, local_path, remove, remove_tree, walk_files
from lit_fast.storage.lock import is_locked
from lit_fast.storage.machine import cpu_count
from lit_fast.storage.paths import StrPath, is_bucket, join, name, suffix
from lit_fast.storage.text_files import read_object, write_json
from lit_fast.towers.embed import default_batch_size, open_tower
from lit_fast.utils.output import result, status
from lit_fast.utils.signals import defer_signals


def embed_dataset(
    path: StrPath,
    tower_spec: str,
    *,
    name: str | None = None,
    preprocess: str | None = None,
    resolution: int | None = None,
    gelu: str | None = None,
    pool: str | None = None,
    backend: str | None = None,
    arch: str | None = None,
    reduced_decode: bool = False,
    views: int = 1,
    batch_size: int | None = None,
    workers: int | None = None,
    dtype: str | None = None,
    max_pixels: int = MAX_PIXELS,
    share: tuple[int, int] | None = None,
    scratch: StrPath = "",
) -> None:
    """Embed the unfinished shards of a share of a dataset.

    Share (i, n) has the shards `s` with `s % n == i`. Several machines may embed a dataset in a bucket at the same time
    without shares: each takes the next shard that no other has locked, until all shards are finished.

    Args:
      preprocess, resolution, gelu, pool, backend, arch: as `load_tower`.
      reduced_decode: decode JPEGs much larger than needed at 1/2, 1/4 or 1/8, see `Preprocess.at_least`.
      views: vectors per image: the first of the whole image, the others of crops.
      batch_size: images per device.
      share: by default the rank of this process and the number of processes of the cluster.
      scratch: local directory for the unfinished shards of a dataset in a bucket (default: the cache).

    Raises:
      UserError: a source is missing, the name belongs to another tower, the disk is full, or no image
        could be decoded.
    """
    given = {
        "preprocess": preprocess, "resolution": resolution, "gelu": gelu, "pool": pool,
        "backend": backend, "arch": arch, "reduced_decode": reduced_decode,
    }  # fmt: skip
    options = {option: value for option, value in given.items() if value}
    if max_pixels != MAX_PIXELS:  # decides which rows are invalid
        options["max_pixels"] = max_pixels
    with defer_signals() as signals:
        is_shared = share is None and process_rank() == (0, 1) and is_bucket(path)
        share = share or process_rank()
        dataset = open_dataset(path)
        if scratch and not is_bucket(dataset.path):
            raise UserError(f"{dataset.path} is not in a bucket and needs no --scratch; leave it out")
        check_sources(dataset)
        tower = open_tower(tower_spec, options)
        name = check_store_name(name or tower.name)
        dtype = dtype or _default_dtype(dataset, name)
        provenance = with_views(tower.provenance(dtype), views) | {"options": options}
        job = Job(
            Features(dataset, name, provenance),
            tower,
            shards=list(range(share[0], dataset.shards, share[1])),
            batch_size=batch_size or default_batch_size(),
            workers=workers or cpu_count(),
            dtype=dtype,
            max_pixels=max_pixels,
            scratch=local_path(scratch),
            is_shared=is_shared,
        )
        try:
            _embed_and_report(job, signals)
        except OSError as error:
            where = error.filename or job.features.path
            raise UserError(
                f"{where}: {os_reason(error)}; fix the cause, then rerun the same command"
            ) from None
        except MemoryError:
            raise UserError(
                "this process is out of memory; lower --batch-size, --workers or --max-pixels"
            ) from None


def _embed_and_report(job: Job, signals: list[int]) -> None:
    """Embed the unfinished shards of a job, and report the numbers of valid and invalid rows.

    Raises:
      UserError: the store belongs to another tower or other rows, or no image could be embedded.
    """
    if different := write_provenance(job.features):
        raise UserError(
            f"{job.features.path} holds features of another tower (other {', '.join(different)}); "
            "choose another --name"
        )
    unfinished = _unfinished_shards(job)
    if unfinished:
        check_images(job.features.dataset)
    rate = embed_shards(job, unfinished, signals) if unfinished else None
    if signals:
        return
    _remove_stale_files(job.features)
    _report(job, rate)
    _report_other_shares(job)


def _default_dtype(dataset: Dataset, name: str) -> str:
    """Return the dtype of the features of this name, as other machines may embed them, else the faster one here."""
    file = join(dataset.path, "features", name, "tower.json")
    recorded = read_object(file).get("dtype") if exists(file) else None
    dtype = str(recorded) if recorded in ("float32", "bfloat16") else fast_dtype()
    status(f"dtype {dtype}, {'that of the features there' if dtype == recorded else 'the faster one here'}")
    return dtype


def check_store_name(name: str) -> str:
    """Return `name` if it can be that of a feature directory, else raise UserError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*", name):
        raise UserError(
            f"{name!r} cannot be the name of a directory; give --name with letters, digits and ._=+- only"
        )
    return name


def write_provenance(features: Features) -> list[str]:
    """Write tower.json, unless there is one.

    Returns:
      The keys in which an existing tower.json of another identity differs; [] if the store belongs to `features`.
    """
    file = join(features.path, "tower.json")
    if not exists(file):
        write_json(file, features.provenance)
    stored = read_object(file)  # read again, since two processes may have written at the same time
    if stored.get("identity") == features.identity:
        return []
    own = features.provenance
    ignored = ("identity", "first_view", "options", "versions", "name", "source")
    different = [k for k in [*own, "views"] if k not in ignored and stored.get(k, 1) != own.get(k, 1)]
    return list(dict.fromkeys(different)) or ["identity"]


def _unfinished_shards(job: Job) -> list[int]:
    """Return the unfinished shards of the share.

    Raises:
      UserError: a manifest of the share belongs to other rows or to another tower.
    """
    features = job.features
    for shard, manifest in features.manifests().items():
        if shard not in job.shards:
            continue
        keys = features.dataset.shard_keys[shard]
        if manifest.rows < features.shard_rows(shard):  # it was finished before the dataset grew
            keys = features.dataset.prefix_digest(shard, manifest.rows)
        if manifest.keys != keys or manifest.tower != features.identity:
            raise UserError(
                f"{features.manifest_path(shard)} belongs to other rows or another tower; choose another --name or "
                f"delete {features.path}"
            )
    finished = features.finished()
    return [shard for shard in job.shards if shard not in finished]


def _remove_stale_files(features: Features) -> None:
    """Delete the unfinished files of killed processes, once all shards are finished.

    Not earlier: another process may be writing a shard of its share.
    """
    if len(features.finished()) < features.dataset.shards:
        return
    for file in walk_files(features.path):
        if suffix(file) == ".__lock" or (name(file).startswith(".") and suffix(file) == ".tmp"):
            remove(join(features.path, file))
    # A kill between the manifest of a shard and the end of its journal leaves the journal.
    remove_tree(join(features.path, "partial"))


def _report(job: Job, rate: float | None) -> None:
    """Print the numbers of valid and invalid rows, and the first invalid ones.

    Raises:
      UserError: all rows are invalid.
    """
    path = job.features.path
    invalid: dict[int, str] = {}
    for shard in job.shards:
        invalid |= job.features.manifest(shard).invalid
    if job.rows and len(invalid) == job.rows:
        reason = next(iter(invalid.values()))
        raise UserError(
            f"none of the {job.rows:,} images could be embedded (first: {reason}); fix the cause, then delete "
            f"{path} and rerun the same command"
        )
    counts = f"{job.rows - len(invalid):,} valid, {len(invalid):,} invalid"
    if rate is None:
        result(f"{path} is complete: {job.rows:,} rows, {counts}")
    else:
        result(
            f"embedded {job.rows:,} rows with {job.tower.name} into {path}: {counts}, {rate:,.0f} images/s"
        )
    if invalid:
        reader, dataset = ImageReader(job.features.dataset), job.features.dataset
        rows = []
        for row in sorted(invalid)[:5]:
            block, i = reader.locate(row)
            rows.append(f"{block.keys[i]} in {dataset.source_names[block.sources[i]]}: {invalid[row]}")
        result(f"invalid: {'; '.join(rows)}{'; ...' if len(invalid) > 5 else ''}")


def _report_other_shares(job: Job) -> None:
    """Print the unfinished shards of other shares, unless a process embeds one of them."""
    finished = set(job.features.finished())
    left = [s for s in range(job.features.dataset.shards) if s not in finished]
    if left and not any(is_locked(shard_lock_path(job.features, shard)) for shard in left):
        command = embed_command(job.features.dataset, job.features.provenance, job.features.tower)
        status(
            f"note: {len(left):,} shards of other shares are unfinished (first: {left[0]}) and no process is embedding "
            f"them; embed them with: {command} --shard-of 0/1"
        )
