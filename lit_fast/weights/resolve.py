"""Find the local file or directory of a tower by name, downloading it on first use."""

from __future__ import annotations

import hashlib
import os
import re
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import quote

from lit_fast.errors import UserError
from lit_fast.storage.download import MAX_BYTES, is_whole, recorded_sha256
from lit_fast.storage.files import read_object, sha256
from lit_fast.storage.hub import Commit, cache_directory, fetch_file
from lit_fast.weights.reader import parts
from lit_fast.weights.registry import known_towers

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


def _nearest(spec: str) -> str:
    near = get_close_matches(spec, [t.name for t in known_towers()], n=2, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


_INDEX = "model.safetensors.index.json"


def local_weights(spec: str) -> Path:
    """The `.npz` or `.safetensors` file, or the index of several, of a path or name."""
    path = resolve(spec)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", _INDEX) if (path / name).is_file()]
        if not found:
            raise UserError(f"tower {spec}: the directory holds neither model.safetensors nor {_INDEX}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"tower {spec}: {path} is not a regular file")
    if not path.name.endswith((".npz", ".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"tower {spec}: only .npz and .safetensors weights can be read, "
            f"not {path.suffix or 'a file without suffix'}"
        )
    return path


def weights_digest(path: Path) -> str:
    """SHA-256 of the weights; of several parts, that of their digests in the order of their names."""
    files = [path] if path.suffix == ".npz" else parts(path)
    digests = []
    for file in files:
        digests.append(sha256(file))
        if recorded_sha256(file) not in (None, digests[-1]):
            raise UserError(f"{file} is not what was downloaded; delete it to have it downloaded again")
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
