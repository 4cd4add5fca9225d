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
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import quote

from lit_fast.download import MAX_BYTES, HttpError, Unreachable, download, is_whole
from lit_fast.errors import UserError
from lit_fast.files import read_object, write_json
from lit_fast.known_towers import known_towers

_BUCKETS = {"augreg": "vit_models/augreg", "big_vision": "big_vision"}
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_AUGREG_FILE = re.compile(r"[A-Za-z0-9]+_\d+-i(1|21)k-\d+ep-lr_[\w.-]+")
_MAX_CONFIG_BYTES = 10_000_000
_MAX_PARTS = 200
_CONFIG, _PROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


def resolve(spec: str) -> Path:
    """The local file or directory of a tower: a path that exists as it is, a name through the cache.

    Returns:
      A path given, a `.npz`, or a directory with config.json, model.safetensors (or its index and parts)
      and, where there is one, preprocessor_config.json. What is in the cache is used without asking the
      server again; to have a newer one, delete it.

    Raises:
      UserError: no such name, it cannot be downloaded, or the server sent something else.
    """
    try:
        if spec and Path(spec).exists():
            return Path(spec)
    except (OSError, ValueError):  # too long, or a null character
        pass
    if spec.startswith("timm:"):
        return _repository(spec, f"timm/{spec.removeprefix('timm:')}", (_CONFIG,), ())
    if spec.startswith("hf:"):
        return _repository(spec, spec.removeprefix("hf:"), (_CONFIG,), (_PROCESSOR,))
    family, _, name = spec.partition("/")
    if family in _BUCKETS and name:
        return _archive(spec, family, name)
    raise UserError(
        f"tower {spec!r} is no file and no name like augreg/B_8, timm:NAME or hf:OWNER/NAME"
        f"{_nearest(spec)}; `lit-fast towers` lists names"
    )


def cache_directory() -> Path:
    """Where downloaded towers are kept."""
    own, xdg = os.environ.get("LIT_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(xdg or "~/.cache") / "lit_fast").expanduser()


def _archive(spec: str, family: str, name: str) -> Path:
    """A `.npz` in one of Google's buckets."""
    known = {t.name: t for t in known_towers()}.get(spec)
    if known:
        place, digest = known.source, known.sha256 or None
    elif family == "augreg" and not _AUGREG_FILE.fullmatch(name.removesuffix(".npz")):
        raise UserError(f"tower {spec!r} is unknown{_nearest(spec)}; `lit-fast towers` lists names")
    else:
        place, digest = f"{_BUCKETS[family]}/{name.removesuffix('.npz')}.npz", None
    if not all(re.fullmatch(_WORD, part) for part in place.split("/")):
        raise UserError(f"tower {spec!r} is not the name of a file in a bucket")
    host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    host = host if "://" in host else f"http://{host}"
    path = cache_directory() / "storage.googleapis.com" / place
    fetch_file(spec, f"{host.rstrip('/')}/{quote(place)}", path, sha256=digest)
    return path


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


def _repository(spec: str, name: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> Path:
    """A repository of the Hugging Face Hub: its configuration and weights, of one commit."""
    match = re.fullmatch(rf"({_WORD}/{_WORD})(?:@({_WORD}(?:/{_WORD})*))?", name)
    if not match:
        raise UserError(f"tower {spec!r} is not of the form hf:OWNER/NAME[@REVISION] or timm:NAME")
    repository, revision = match[1], match[2] or "main"
    directory = cache_directory() / "huggingface" / repository / quote(revision, safe="")
    whole = directory / "files.json"
    if whole.exists():
        files = read_object(whole, "files")["files"]
        if isinstance(files, list) and all(is_whole(directory / Path(str(f)).name) for f in files):
            return directory
    commit = Commit(spec, repository, revision, directory)

    def fetch(file: str, *, may_lack: bool = False) -> bool:
        limit = MAX_BYTES if file.endswith(".safetensors") else _MAX_CONFIG_BYTES
        return commit.fetch(file, may_lack=may_lack, max_bytes=limit)

    files = [f for f in needed if fetch(f)] + [f for f in optional if fetch(f, may_lack=True)]
    if fetch(_WEIGHTS, may_lack=True):
        files.append(_WEIGHTS)
    else:
        index = f"{_WEIGHTS}.index.json"
        if not fetch(index, may_lack=True):
            raise UserError(f"{spec} has no {_WEIGHTS}; weights in other formats are not read")
        files += [index, *(p for p in _parts(directory / index) if fetch(p))]
    commit.write(whole, files)
    return directory


def _parts(index: Path) -> list[str]:
    """Files of weights in several parts; their names come from outside and must stay in the directory."""
    table = read_object(index, "weight_map")["weight_map"]
    names = set(table.values()) if isinstance(table, dict) else set()
    if not names or len(names) > _MAX_PARTS:
        raise UserError(f"{index} is damaged: weight_map names {len(names)} files")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(rf"{_WORD}\.safetensors", name):
            raise UserError(f"{index} is damaged: {str(name)[:80]!r} is not the name of a part")
    return sorted(names)


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


def _nearest(spec: str) -> str:
    near = get_close_matches(spec, [t.name for t in known_towers()], n=2, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""
