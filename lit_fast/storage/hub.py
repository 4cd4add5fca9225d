"""Names of public towers, and where their files lie: in a cache that is filled on first use.

    augreg/NAME       `lit-fast towers` lists the usual ones; the stem of any file of the AugReg bucket
    big_vision/PATH   a .npz in the big_vision bucket
    timm:NAME         the repository timm/NAME of the Hugging Face Hub
    hf:OWNER/NAME     a repository of the Hub, with @REVISION if need be

The cache is `$LIT_FAST_CACHE`, else `$XDG_CACHE_HOME/lit_fast`, else `~/.cache/lit_fast`. `HF_ENDPOINT`,
`HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to Hugging Face's own tools, `STORAGE_EMULATOR_HOST`
what it means to Google's; `LIT_FAST_OFFLINE` is a second name for `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from lit_fast.errors import UserError
from lit_fast.storage.download import MAX_BYTES, HttpError, Unreachable, download, is_whole
from lit_fast.storage.files import write_json


def cache_directory() -> Path:
    """Where downloaded towers are kept."""
    own, xdg = os.environ.get("LIT_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(xdg or "~/.cache") / "lit_fast").expanduser()


class Commit:
    """One commit of a repository of the Hugging Face Hub: the one that its first file came from."""

    def __init__(self, spec: str, repository: str, revision: str, directory: Path) -> None:
        self._spec, self._repository, self._commit = spec, repository, revision
        self._directory = directory

    def fetch(self, file: str, *, max_bytes: int, may_lack: bool = False) -> bool:
        """Whether the repository has the file, which is in the directory then.

        Raises:
          UserError: see `fetch_file`.
        """
        url = f"{endpoint()}/{self._repository}/resolve/{quote(self._commit, safe='')}/{quote(file)}"
        got = fetch_file(
            self._spec,
            url,
            self._directory / file,
            headers=token_header(),
            may_lack=may_lack,
            max_bytes=max_bytes,
        )
        answered = (got or {}).get("x-repo-commit", "")
        if re.fullmatch("[0-9a-f]{40}", answered):  # `main` may move between two files
            self._commit = answered
        return got is not None

    def write(self, path: Path, files: Sequence[str]) -> None:
        """Note that all files are there, after the last one."""
        write_json(
            path, {"source": f"{endpoint()}/{self._repository}", "commit": self._commit, "files": files}
        )


def fetch_file(
    spec: str,
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    may_lack: bool = False,
    max_bytes: int = MAX_BYTES,
) -> dict[str, str] | None:
    """Have the file at `path`; what the server said of it, or None if it has none and may lack it."""
    if is_whole(path):
        return {}
    by_hand = f"bring {url} and put it at {path}, or give the path of a local file"
    if offline():
        if may_lack:
            return None
        raise UserError(f"{spec} is not in the cache and no request may be made (offline); {by_hand}")
    try:
        return download(url, path, sha256=sha256, headers=headers, max_bytes=max_bytes).headers
    except HttpError as error:
        if may_lack and error.status == 404:
            return None
        if error.status in (401, 403):
            why = "is unknown, private or gated: check the name, accept its licence and set HF_TOKEN"
        else:
            why = "does not exist: check the name" if error.status in (404, 410) else "was refused"
        raise UserError(f"{spec}: {url} {why} (status {error.status}), or give a local file") from None
    except Unreachable as error:
        raise UserError(f"{spec} cannot be downloaded: {error}; {by_hand}") from None


def endpoint() -> str:
    """Address of the Hugging Face Hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Whether the environment forbids requests."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("LIT_FAST_OFFLINE", "HF_HUB_OFFLINE")
    )


def token_header() -> dict[str, str]:
    """What a request to the Hub says of who asks."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        return {}
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UserError("HF_TOKEN is not a token: it holds spaces or strange characters")
    return {"Authorization": f"Bearer {token}"}
