"""Dataset repositories of the Hugging Face Hub: list, upload and download their files.

Tokens and addresses are those of `lit_fast.storage.hub`. An upload that is interrupted continues: files that the
repository has are skipped, and so are those whose content its storage has.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.atomic import sync_path
from lit_fast.storage.files import (
    digest,
    is_file,
    list_names,
    local_path,
    read_bytes,
    remove,
    remove_tree,
    size,
)
from lit_fast.storage.hub import hub_problem, offline, silence_retries
from lit_fast.storage.paths import join

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PATHS = 500  # in a request


@dataclass(frozen=True)
class FileDigest:
    """The size and the SHA-256 of a file."""

    size: int  # bytes
    sha256: str

    @classmethod
    def of(cls, content: str | bytes) -> FileDigest:
        """Return those of a local file or of bytes."""
        if isinstance(content, bytes):
            return cls(len(content), hashlib.sha256(content).hexdigest())
        return cls(size(content), digest(content, "sha256"))


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    size: int  # bytes
    blob: str  # SHA-1 of a small file as git has it; of the pointer of a large file
    sha256: str  # of a large file; "" of a small one

    def has(self, content: str | bytes, known: FileDigest) -> bool:
        """Return whether the repository has exactly this local file or these bytes."""
        if self.size != known.size or self.sha256:
            return self.size == known.size and self.sha256 == known.sha256
        data = content if isinstance(content, bytes) else read_bytes(content)
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.blob


class HubDataset:
    """A dataset repository.

    Args:
      name: `OWNER/NAME`.
      action: "pulled" or "pushed", for messages.

    Raises:
      UserError: the name is malformed, or no request may be made; from any method: the Hub refuses or does not answer.
    """

    def __init__(self, name: str, action: str) -> None:
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} is not the name of a repository; give OWNER/NAME")
        if offline():
            raise UserError(
                f"{name} cannot be {action}: no request may be made (offline); unset LIT_FAST_OFFLINE and "
                "HF_HUB_OFFLINE"
            )
        self.name, self._action = name, action
        silence_retries()

    @property
    def address(self) -> str:
        """Address of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/datasets/{self.name}"

    def create(self, public: bool) -> bool:
        """Make the repository, unless it exists; return whether it is public.

        Raises:
          UserError: it exists and is public although `public` is False.
        """
        with self._problems():
            self._api().create_repo(self.name, private=not public, repo_type="dataset", exist_ok=True)
            is_private = self._api().dataset_info(self.name).private
        if not public and not is_private:
            raise UserError(f"{self.name} is public; give --public to push there, or choose another name")
        return not is_private

    def commit_of(self, revision: str) -> str:
        """Return the commit of a branch, tag or commit."""
        with self._problems():
            return str(self._api().dataset_info(self.name, revision=revision).sha)

    def files(self) -> dict[str, HubFile]:
        """Return all files of the main branch by their paths."""
        with self._problems():
            return _files(self._api().list_repo_tree(self.name, recursive=True, repo_type="dataset"))

    def files_at(self, commit: str, paths: Sequence[str]) -> dict[str, HubFile]:
        """Return those of some files that a commit has, by their paths."""
        found: dict[str, HubFile] = {}
        with self._problems():
            for first in range(0, len(paths), _PATHS):
                chunk = list(paths[first : first + _PATHS])
                entries = self._api().get_paths_info(self.name, chunk, revision=commit, repo_type="dataset")
                found |= _files(entries)
        return found

    def commit(self, additions: Mapping[str, str | bytes], deletions: Collection[str], message: str) -> None:
        """Upload local files or bytes by their paths in the repository, and delete others, in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.utils import logging

        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in additions.items()]
        operations += [CommitOperationDelete(path) for path in deletions]
        with self._problems(), _quiet():
            logging.set_verbosity(logging.CRITICAL)
            self._api().create_commit(
                self.name, operations, commit_message=message, repo_type="dataset", revision="main"
            )

    def download(self, path: str, commit: str, directory: str, wanted: FileDigest) -> None:
        """Download a file to its path below a directory, unless it is there; an interrupted download continues.

        Raises:
          UserError: the file has another size or digest than `wanted`.
        """
        target = join(directory, path)
        if is_file(target) and FileDigest.of(target) == wanted:
            return
        import huggingface_hub as hub

        with self._problems(path), _quiet():
            hub.hf_hub_download(
                self.name, path, repo_type="dataset", revision=commit, local_dir=local_path(directory)
            )
        found = FileDigest.of(target)
        if found != wanted:
            remove(target)
            raise UserError(
                f"{self.name} has {found.size:,} bytes of digest {found.sha256[:12]} in {path}, not {wanted.size:,} of "
                f"{wanted.sha256[:12]}; pull another revision, or ask its owner"
            )
        sync_path(target)

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi()

    @contextmanager
    def _problems(self, path: str = "") -> Iterator[None]:
        """Raise the errors of huggingface_hub, of httpx and of the disk as `UserError`."""
        from huggingface_hub import errors

        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raised: BaseException = error
            while not isinstance(raised, errors.HfHubHTTPError) and raised.__cause__ is not None:
                raised = raised.__cause__
            response = raised.response.status_code if isinstance(raised, errors.HfHubHTTPError) else 0
            if isinstance(error, OSError) and error.errno and error.filename:
                raise unreadable(error.filename, error) from None
            absent = isinstance(raised, errors.RepositoryNotFoundError | errors.GatedRepoError)
            if response in (401, 403) and (self._action == "pushed" or not absent):
                raise UserError(
                    f"{self.name} may not be {self._action} ({response}); run hf auth login with a token that may "
                    f"{'write to' if self._action == 'pushed' else 'read'} it"
                ) from None
            known = errors.HfHubHTTPError | errors.HFValidationError
            if isinstance(raised, known):
                raise UserError(f"{self.name} {hub_problem(raised, self.name, 'dataset', path)}") from None
            reason = first_line(raised)
            raise UserError(
                f"{self.name} cannot be {self._action}: {reason} ({self.address}); fix the cause, then rerun "
                "the same command"
            ) from None


def _files(entries: Iterable[Any]) -> dict[str, HubFile]:
    from huggingface_hub.hf_api import RepoFile

    return {
        str(entry.path): HubFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else "")
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def remove_download_records(directory: str) -> None:
    """Delete what huggingface_hub records below a directory about its downloads."""
    if "huggingface" in list_names(join(directory, ".cache")):
        remove_tree(join(directory, ".cache"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Show none of huggingface_hub's progress bars."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
