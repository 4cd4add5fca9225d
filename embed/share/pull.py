"""`lit-fast pull`: download a dataset that `lit-fast push` has uploaded.

The files are downloaded to a directory beside D, checked, and then get the name D. If the command is interrupted, the
same command continues. A repository is not trusted: only the files of a dataset are downloaded, with the sizes and
digests that its manifest states, and then read as `lit-fast verify` does.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import open_features, stored_towers
from lit_fast.data.images.sources import absent_places
from lit_fast.data.tokens import open_tokens, stored_tokenizers
from lit_fast.embed.locks import LOCK, lock_rows
from lit_fast.embed.share.manifest import MAX_BYTES, NAME, Manifest, decode_manifest
from lit_fast.embed.verify.features import verify_features
from lit_fast.embed.verify.records import verify_records
from lit_fast.errors import UserError
from lit_fast.storage.files import (
    exists,
    free_space,
    is_directory,
    is_file,
    list_names,
    local_path,
    make_directory,
    read_whole,
    remove,
    remove_tree,
    rename,
    size,
    walk_files,
)
from lit_fast.storage.hub import AbsentError, Snapshot
from lit_fast.storage.hub_dataset import FileDigest, HubDataset, remove_download_records
from lit_fast.storage.lock import Lock, check_unlocked
from lit_fast.storage.paths import StrPath, absolute, join, name, parent
from lit_fast.utils.format import format_bytes
from lit_fast.utils.output import result, status
from lit_fast.utils.progress import Progress

_THREADS = 8


def pull_dataset(
    repository: str,
    path: StrPath,
    *,
    revision: str = "main",
    towers: Sequence[str] | None = None,
    tokenizers: Sequence[str] | None = None,
) -> None:
    """Download a dataset to `path`, or the stores of it that are not there yet.

    Args:
      repository: `OWNER/NAME`.
      revision: a branch, tag or commit.
      towers, tokenizers: names of the stores; None: all.

    Raises:
      UserError: the repository holds no dataset or a damaged one, or `path` holds something else.
    """
    out = local_path(path)  # the Hub's library writes local files only
    hub = HubDataset(repository, "pulled")
    commit = hub.commit_of(revision)
    manifest = _read_manifest(hub, commit).select(towers, tokenizers)
    if exists(out) and (list_names(out) or not is_directory(out)):
        manifest = _missing_stores(manifest, out, repository)
        if not manifest.files:
            result(f"{out} has all of {repository} already")
            return
    _check_sizes(hub, commit, manifest)
    partial = _partial(out)
    check_unlocked([join(out, LOCK)], out, "choose another directory")
    with Lock(f"{partial}.lock", out, "choose another directory") as lock:
        _download(hub, commit, manifest, partial)
        dataset = _check_dataset(partial, manifest, out, repository)
        lock.check()
        _move(partial, out, manifest)
    _report(dataset, manifest, out, f"{repository} at {commit[:12]}")


def _read_manifest(hub: HubDataset, commit: str) -> Manifest:
    try:
        file = Snapshot(hub.name, commit, "dataset").fetch(NAME, MAX_BYTES)
    except AbsentError:
        raise UserError(
            f"{hub.name} has no {NAME}; it was not made, or not finished, by lit-fast push"
        ) from None
    return decode_manifest(read_whole(file, MAX_BYTES) or b"", f"{hub.name}/{NAME}")


def _missing_stores(manifest: Manifest, out: str, repository: str) -> Manifest:
    """Return the manifest with the stores alone that the dataset at `out` lacks.

    Raises:
      UserError: there is something else at `out`.
    """
    if not exists(join(out, "dataset.json")):
        raise UserError(f"{out} holds other files; choose an empty or new directory")
    dataset = open_dataset(out)
    if dataset.digest != manifest.digest:
        raise UserError(f"{out} is already another dataset than {repository}; choose another directory")
    here = {"features": set(stored_towers(dataset)), "tokens": set(stored_tokenizers(dataset))}
    stores = {part: [s for s in manifest.stores(part) if s not in names] for part, names in here.items()}
    missing = manifest.select(stores["features"], stores["tokens"])
    return Manifest(
        manifest.rows,
        manifest.digest,
        {file: d for file, d in missing.files.items() if file.startswith(("features/", "tokens/"))},
    )


def _check_sizes(hub: HubDataset, commit: str, manifest: Manifest) -> None:
    """Refuse a repository that lacks files or has larger ones than its manifest states."""
    there = hub.files_at(commit, list(manifest.files))
    for file, wanted in manifest.files.items():
        if file not in there:
            raise UserError(
                f"{hub.name} has no {file}, which its {NAME} names; ask its owner to push it again"
            )
        if there[file].size != wanted.size:
            raise UserError(
                f"{hub.name} has {there[file].size:,} bytes in {file}, but its {NAME} states {wanted.size:,}; ask its "
                "owner to push it again"
            )


def _partial(out: str) -> str:
    target = absolute(out)
    return join(parent(target), f".{name(target)}.pull")


def _download(hub: HubDataset, commit: str, manifest: Manifest, partial: str) -> None:
    """Download all files of the manifest to `partial`, which then holds no others."""
    make_directory(partial)
    for file in list(walk_files(partial)):
        if file not in manifest.files and not file.startswith(".cache/huggingface/"):
            remove(join(partial, file))
    total = sum(file.size for file in manifest.files.values())
    here = sum(size(path) for file in manifest.files if is_file(path := join(partial, file)))
    if total - here > (free := free_space(partial)):
        raise UserError(
            f"{hub.name} needs {format_bytes(total - here)} at {parent(partial)}, which has {format_bytes(free)} free; "
            "choose another disk"
        )
    status(f"pull {len(manifest.files):,} files, {format_bytes(total)}, from {hub.address} at {commit[:12]}")
    progress = Progress("pull", total // 1_000_000, "MB")

    def download(item: tuple[str, FileDigest]) -> int:
        hub.download(item[0], commit, partial, item[1])
        return item[1].size

    done = 0
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pull") as pool:
        futures = [pool.submit(download, item) for item in manifest.files.items()]
        try:
            for future in futures:
                done += future.result()
                progress.advance(done // 1_000_000 - progress.done)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    remove_download_records(partial)


def _check_dataset(partial: str, manifest: Manifest, out: str, repository: str) -> Dataset:
    """Read all that was downloaded and return the dataset that it belongs to.

    Raises:
      UserError: the dataset is not the one of the manifest, or something in it is wrong.
    """
    if "dataset.json" in manifest.files:
        dataset = open_dataset(partial)
        if (dataset.digest, dataset.rows) != (manifest.digest, manifest.rows):
            raise UserError(f"{repository} holds another dataset than its {NAME} states; ask its owner")
        findings = list(verify_records(dataset))
    else:  # stores for a dataset that is there
        dataset = open_dataset(out)
        findings = []
    for tower in manifest.stores("features"):
        store = open_features(_at(dataset, partial), tower)
        findings += verify_features(store, range(dataset.shards), 0)
    for tokenizer in manifest.stores("tokens"):
        open_tokens(_at(dataset, partial), tokenizer).tokenizer()
    for finding in findings:
        if finding.wrong:
            raise UserError(
                f"{repository} is damaged in its {finding.part}: {finding.what}; ask its owner, and delete {partial}"
            )
    return dataset


def _at(dataset: Dataset, path: str) -> Dataset:
    return replace(dataset, path=path)


def _move(partial: str, out: str, manifest: Manifest) -> None:
    """Move the downloaded files to their place."""
    if "dataset.json" in manifest.files:
        rename(partial, absolute(out))
        return
    with lock_rows(out):
        for part in ("tokens", "features"):
            for store in manifest.stores(part):
                make_directory(join(out, part))
                rename(join(partial, part, store), join(out, part, store))
    remove_tree(partial)


def _report(dataset: Dataset, manifest: Manifest, out: str, origin: str) -> None:
    towers, tokenizers = manifest.stores("features"), manifest.stores("tokens")
    parts = [f"features {tower}" for tower in towers] + [f"tokens {tokenizer}" for tokenizer in tokenizers]
    result(
        f"pulled {dataset.rows:,} rows with {dataset.captions:,} captions{''.join(f', {part}' for part in parts)} "
        f"from {origin} into {out}"
    )
    if dataset.captions and not stored_tokenizers(_at(dataset, out)):
        result(f"make tokens with: lit-fast tokenize {shlex.quote(out)} --train-vocab 32000")
    if elsewhere := absent_places(dataset.sources):
        more = f" and {len(elsewhere) - 1} more" if len(elsewhere) > 1 else ""
        result(
            f"the images are not included; if you have those of {elsewhere[0]}{more}, connect them with: lit-fast "
            f"index --relocate {elsewhere[0]}=DIRECTORY {shlex.quote(out)}"
        )
