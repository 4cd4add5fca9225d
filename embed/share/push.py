"""`lit-fast push`: upload a dataset to a dataset repository of the Hugging Face Hub.

Files are committed in groups and `lit_fast.json` with the last one, so that nobody pulls half a dataset. Files that the
repository has are skipped: if the command is interrupted, the same command continues.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lit_fast.data.dataset import SHARD, Dataset, open_dataset
from lit_fast.data.features import Features, open_features, stored_towers
from lit_fast.data.tokens import Tokens, open_tokens, stored_tokenizers
from lit_fast.embed.share.card import MARK, write_card
from lit_fast.embed.share.contents import Places, dataset_files
from lit_fast.embed.share.manifest import MAX_BYTES, NAME, Manifest, decode_manifest
from lit_fast.errors import UserError
from lit_fast.storage.files import local_path, read_whole
from lit_fast.storage.hub import Snapshot
from lit_fast.storage.hub_dataset import FileDigest, HubDataset, HubFile
from lit_fast.storage.paths import StrPath
from lit_fast.storage.text_files import read_json
from lit_fast.utils.format import format_bytes
from lit_fast.utils.output import result, status
from lit_fast.utils.progress import Progress

_GROUP_FILES = 100  # in a commit
_GROUP_BYTES = 4 << 30

_LAST = ("dataset.json", NAME)  # in the last commit


def push_dataset(
    path: StrPath,
    repository: str,
    *,
    towers: Sequence[str] | None = None,
    tokenizers: Sequence[str] | None = None,
    public: bool = False,
    licence: str = "",
) -> None:
    """Upload a dataset without its images.

    Args:
      repository: `OWNER/NAME`.
      towers, tokenizers: names of the stores; None: all that are complete.
      public: make a new repository public; else it is private.
      licence: for the card, "" = unknown.

    Raises:
      UserError: a store is incomplete, the repository is public or holds another dataset, or the Hub refuses.
    """
    path = local_path(path)  # the Hub's library reads local files only
    hub = HubDataset(repository, "pushed")
    if licence and not re.fullmatch(r"[\w.+-]{1,100}", licence, re.ASCII):
        raise UserError(
            f"--license {licence!r} is not the name of a licence; give one like cc-by-4.0, or other"
        )
    dataset = open_dataset(path)
    features, tokens = _choose_features(dataset, towers), _choose_tokens(dataset, tokenizers)
    places = Places.of(dataset)
    files = dataset_files(dataset, features, tokens, places)
    _note_paths_in_keys(dataset)
    is_public = hub.create(public)
    if public and not is_public:
        status(f"note: {repository} exists and stays private; change this at {hub.address}/settings")
    there = hub.files()
    before = _pushed_before(hub, there, dataset)
    digests = _digests(files)
    manifest = Manifest(dataset.rows, dataset.digest, (before.files if before else {}) | digests)
    obsolete: list[str] = []
    if (
        before and before.digest != dataset.digest
    ):  # the dataset has grown, and other stores are of fewer rows
        obsolete = [file for file in before.files if file not in digests and file in there]
        manifest = Manifest(dataset.rows, dataset.digest, digests)
    files[NAME] = manifest.encode()
    digests[NAME] = FileDigest.of(files[NAME])
    if "README.md" not in there or _is_own_card(hub, there):
        card = write_card(repository, dataset, features, tokens, places, licence).encode()
        files["README.md"], digests["README.md"] = card, FileDigest.of(card)
    new = [name for name in files if name not in there or not there[name].has(files[name], digests[name])]
    total = sum(digests[name].size for name in new)
    status(
        f"push {len(new):,} of {len(files):,} files, {format_bytes(total)}, to {hub.address}"
        f" ({'public' if is_public else 'private'})"
    )
    progress = Progress("push", total // 1_000_000, "MB")
    done = 0
    # The card first: the Hub refuses it if it does not know the licence.
    early = sorted((name for name in new if name not in _LAST), key=lambda name: name != "README.md")
    for group in _groups(early, digests):
        hub.commit({name: files[name] for name in group}, [], "Upload with lit-fast push")
        done += sum(digests[name].size for name in group)
        progress.advance(done // 1_000_000 - progress.done)
    last = [name for name in new if name in _LAST]
    if last or obsolete:
        hub.commit({name: files[name] for name in last}, obsolete, "Upload with lit-fast push")
    parts = [f"features {f.tower}" for f in features] + [f"tokens {t.name}" for t in tokens]
    result(
        f"pushed {dataset.rows:,} rows with {dataset.captions:,} captions{''.join(f', {part}' for part in parts)} to "
        f"{hub.address}, without images; get it with: lit-fast pull {repository} D"
    )


def _choose_features(dataset: Dataset, names: Sequence[str] | None) -> list[Features]:
    if names is not None:
        stores = [open_features(dataset, name) for name in dict.fromkeys(names)]
        for store in stores:
            store.invalid_rows()  # raises if it is not whole
        return stores
    stores = []
    for name in stored_towers(dataset):
        try:
            store = open_features(dataset, name)
            store.invalid_rows()
            stores.append(store)
        except UserError as error:
            status(f"note: features {name} are not pushed: {error}")
    return stores


def _choose_tokens(dataset: Dataset, names: Sequence[str] | None) -> list[Tokens]:
    if names is not None:
        return [open_tokens(dataset, name) for name in dict.fromkeys(names)]
    stores = []
    for name in stored_tokenizers(dataset):
        try:
            stores.append(open_tokens(dataset, name))
        except UserError as error:
            status(f"note: tokens {name} are not pushed: {error}")
    return stores


def _note_paths_in_keys(dataset: Dataset) -> None:
    """Print a note if keys of rows are absolute paths, which cannot be replaced."""
    keys = next(dataset.iter_blocks()).keys if dataset.blocks else []
    if paths := [key for key in keys if key.startswith("/")]:
        status(
            f"note: the keys of the rows are paths of this machine and are pushed as they are ({paths[0]})"
        )


def _digests(files: dict[str, str | bytes]) -> dict[str, FileDigest]:
    progress, found = Progress("read", len(files), "files"), {}
    for name, content in files.items():
        found[name] = FileDigest.of(content)
        progress.advance()
    return found


def _pushed_before(hub: HubDataset, there: dict[str, HubFile], dataset: Dataset) -> Manifest | None:
    """Return the manifest of the repository, None without one.

    Raises:
      UserError: it is of another dataset, and not of fewer rows of this one.
    """
    if NAME not in there:
        return None
    snapshot = Snapshot(hub.name, hub.commit_of("main"), "dataset")
    data = read_whole(snapshot.fetch(NAME, MAX_BYTES), MAX_BYTES) or b""
    manifest = decode_manifest(data, f"{hub.name}/{NAME}")
    if manifest.digest != dataset.digest:
        known = read_json(snapshot.fetch("dataset.json", MAX_BYTES)).get("shard_keys", [])
        rest = manifest.rows - (len(known) - 1) * SHARD
        begins = known[:-1] == list(dataset.shard_keys[: len(known) - 1])
        if not known or not begins or dataset.prefix_digest(len(known) - 1, rest) != known[-1]:
            raise UserError(
                f"{hub.name} holds another dataset, of {manifest.rows:,} rows; choose another repository"
            )
    return manifest


def _is_own_card(hub: HubDataset, there: dict[str, HubFile]) -> bool:
    if there["README.md"].size > 1 << 20:
        return False
    file = Snapshot(hub.name, hub.commit_of("main"), "dataset").fetch("README.md", 1 << 20)
    return MARK.encode() in (read_whole(file, 1 << 20) or b"")


def _groups(names: list[str], digests: dict[str, FileDigest]) -> Iterator[list[str]]:
    """Yield the files of each commit."""
    group: list[str] = []
    size = 0
    for name in names:
        if group and (len(group) == _GROUP_FILES or size + digests[name].size > _GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(name)
        size += digests[name].size
    if group:
        yield group
