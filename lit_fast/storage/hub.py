"""Download files of the Hugging Face Hub to the cache that huggingface_hub shares with transformers and timm.

huggingface_hub reads the token of `hf auth login`, HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE.
Only files that are requested by name are downloaded.
"""

from __future__ import annotations

import os
import re
from typing import Any

from lit_fast.errors import UserError, first_line

_TRUE = ("1", "true", "yes", "on")
_COMMIT = re.compile("[0-9a-f]{40}")


def offline() -> bool:
    """Return whether LIT_FAST_OFFLINE or HF_HUB_OFFLINE forbids requests."""
    return any(os.environ.get(n, "").lower() in _TRUE for n in ("LIT_FAST_OFFLINE", "HF_HUB_OFFLINE"))


def silence_retries() -> None:
    """Silence huggingface_hub's messages about retries, unless HF_HUB_VERBOSITY is set; errors report failures."""
    from huggingface_hub.utils import logging

    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity(logging.CRITICAL)


class AbsentError(UserError):
    """The repository has no such file."""


class Snapshot:
    """One commit of a repository: the commit of the revision when the first file is fetched.

    Args:
      repository: `OWNER/NAME`.
      revision: a branch, tag or commit.
      repo_type: "model" or "dataset".
    """

    def __init__(self, repository: str, revision: str = "main", repo_type: str = "model") -> None:
        self.repository, self.revision, self.repo_type = repository, revision, repo_type

    def fetch(self, name: str, max_bytes: int | None = None) -> str:
        """Return the path of a file in the cache, downloading it unless it is there.

        Args:
          name: the file's path in the repository.
          max_bytes: a larger file is refused before it is downloaded.

        Raises:
          AbsentError: the repository has no such file; offline: it is not in the cache.
          UserError: the repository is absent, private or gated, the file is too large, or the download fails.
        """
        import huggingface_hub as hub

        silence_retries()
        options: dict[str, Any] = {"revision": self.revision, "repo_type": self.repo_type}
        if _COMMIT.fullmatch(self.revision):  # files of a commit do not change: no request is needed
            cached = hub.try_to_load_from_cache(self.repository, name, **options)
            if isinstance(cached, str):
                return cached
            if cached is not None:  # known to be absent
                raise AbsentError(f"{self} has no {name}; see {_page(self.repository, self.repo_type)}")
        options["local_files_only"] = offline()
        try:
            if max_bytes is not None:
                size = hub.hf_hub_download(self.repository, name, dry_run=True, **options).file_size
                if size > max_bytes:
                    raise UserError(
                        f"{self} has {size:,} bytes in {name}, more than {max_bytes:,}; check the name"
                    )
            path = hub.hf_hub_download(self.repository, name, **options)
        except UserError:
            raise
        except Exception as error:  # of huggingface_hub, of httpx, of the disk
            absent = isinstance(error, hub.errors.RemoteEntryNotFoundError) or (
                isinstance(error, hub.errors.LocalEntryNotFoundError) and offline()
            )
            kind = AbsentError if absent else UserError
            raise kind(f"{self} {hub_problem(error, self.repository, self.repo_type, name)}") from None
        self.revision = os.path.basename(path[: -len(name) - 1])  # .../snapshots/COMMIT/NAME
        return path

    def __str__(self) -> str:
        revision = "" if self.revision == "main" or _COMMIT.fullmatch(self.revision) else f"@{self.revision}"
        return f"hf:{'datasets/' if self.repo_type == 'dataset' else ''}{self.repository}{revision}"


def _page(repository: str, repo_type: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repository}"


def hub_problem(error: BaseException, repository: str, repo_type: str = "model", name: str = "") -> str:
    """Return the problem and the action for an exception of huggingface_hub, to follow the object in a message."""
    from huggingface_hub import errors

    page = _page(repository, repo_type)
    option = " --repo-type dataset" if repo_type == "dataset" else ""
    action = f'run "hf download {repository}{option} --local-dir DIR" elsewhere and give DIR'
    match error:
        case errors.GatedRepoError():
            return f"is gated; accept its licence at {page} and run: hf auth login"
        case errors.RepositoryNotFoundError():
            return f"does not exist or is private ({page}); check the name, or run: hf auth login"
        case errors.RevisionNotFoundError():
            return f"has no such revision; see {page}"
        case errors.RemoteEntryNotFoundError():
            return f"has no {name or 'such file'}; see {page}"
        case errors.HFValidationError():
            return "is not the name of a repository; give OWNER/NAME"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            return f"was refused by the server with status {status} ({page}); rerun the same command later"
    if offline() or isinstance(error, errors.OfflineModeIsEnabled):
        return f"is not in the cache and no request may be made (offline); {action}"
    return f"cannot be downloaded from {page}: {first_line(error.__cause__ or error)}; {action}"
