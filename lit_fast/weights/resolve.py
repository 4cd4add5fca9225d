"""Resolve names of models and tokenizers to local files, downloading them on first use. All forms of names are here.

PATH                      a file or directory that exists
augreg/NAME               a file of the AugReg bucket; `lit-fast towers` lists the usual ones
big_vision/PATH           a .npz in the big_vision bucket
timm:NAME                 the repository timm/NAME of the Hugging Face Hub
hf:OWNER/NAME[@REVISION]  a repository of the Hub; also hf-hub:OWNER/NAME and a bare OWNER/NAME
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from urllib.parse import quote

from lit_fast.errors import UserError
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.cache import cache_directory, cached_file, local_copy
from lit_fast.storage.files import exists, is_directory, is_file, read_bytes, sha256
from lit_fast.storage.hub import AbsentError, Snapshot, offline
from lit_fast.storage.paths import StrPath, absolute, join, name, parent, stem, suffix
from lit_fast.weights.reader import parts
from lit_fast.weights.registry import known_towers
from lit_fast.weights.tokenizer_json import sentencepiece_model

BUCKETS = {"augreg": "vit_models/augreg", "big_vision": "big_vision"}
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"({_WORD}/{_WORD})(?:@({_WORD}(?:/{_WORD})*))?")
_AUGREG_FILE = re.compile(r"[A-Za-z0-9]+_\d+-i(1|21)k-\d+ep-lr_[\w.-]+")
_SUFFIXES = (".npz", ".safetensors", ".safetensors.index.json")
_FILE_SUFFIXES = (*_SUFFIXES, ".model", ".toml")  # a name with one is a path, not a repository
_MAX_CONFIG_BYTES = 10_000_000
_MAX_TOKENIZER_BYTES = 100_000_000
_CONFIG, _PROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_INDEX = f"{_WEIGHTS}.index.json"


def resolve(spec: str) -> str:
    """Return the local file or directory of a tower, downloading it on first use.

    Returns:
      `spec` itself where it exists, a `.npz`, or a directory with config.json, model.safetensors (or its index and
      parts) and, where the repository has one, preprocessor_config.json; or with open_clip_config.json and
      open_clip_model.safetensors. All files of a directory are of one commit.

    Raises:
      UserError: no such name, or the download fails.
    """
    if spec and exists(spec):
        return spec
    if snapshot := find_repository(spec):
        with _absent_path(spec):
            return _fetch_tower(snapshot, optional=() if spec.startswith("timm:") else (_PROCESSOR,))
    family, _, rest = spec.partition("/")
    if family in BUCKETS and rest:
        return _fetch_archive(spec, family, rest)
    raise UserError(
        f"tower {spec!r} is neither a file nor a name; give a path or a name like augreg/B_8, timm:NAME or "
        f"hf:OWNER/NAME{_nearest(spec)}; `lit-fast towers` lists names"
    )


def resolve_tokenizer(location: StrPath) -> tuple[str, str]:
    """Return the local path of a sentencepiece model, which may be in a repository of the Hub, and a name for it.

    A repository has it as a file, or as a `tokenizer.json` that is converted.

    Raises:
      UserError: the repository has neither, `tokenizer.json` cannot be converted, or the download fails.
    """
    location = os.fspath(location)
    snapshot = None if exists(location) else find_repository(location)
    if snapshot is None:
        return location, stem(location)
    with _absent_path(location):
        return _fetch_tokenizer(snapshot), name(snapshot.repository)


def find_repository(spec: str) -> Snapshot | None:
    """Return the repository of the Hub that a name refers to, None for a name of another form.

    Raises:
      UserError: the name has a prefix of the Hub, but is not that of a repository.
    """
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in ("hf", "hf-hub", "timm"):
        match = _REPOSITORY.fullmatch(f"timm/{rest}" if prefix == "timm" else rest)
        if not match:
            raise UserError(
                f"{spec!r} is not the name of a repository; give hf:OWNER/NAME[@REVISION] or timm:NAME"
            )
        return Snapshot(match[1], match[2] or "main")
    match = _REPOSITORY.fullmatch(spec)
    if not match or spec.partition("/")[0] in BUCKETS or match[1].endswith(_FILE_SUFFIXES):
        return None
    return Snapshot(match[1], match[2] or "main")


def fetch_folder(snapshot: Snapshot, needed: Sequence[str], optional: Sequence[str] = ()) -> str:
    """Return the directory of files of a repository; `.safetensors` may have any size, others 10 MB.

    Raises:
      UserError: one of `needed` is absent, or the download fails.
    """
    found = [_fetch(snapshot, file) for file in needed]
    for file in optional:
        try:
            _fetch(snapshot, file)
        except AbsentError:
            continue
    return parent(found[0])


def local_weights(spec: str) -> str:
    """Return the `.npz` or `.safetensors` file, or the index of several, of a path or name.

    Raises:
      UserError: as `resolve`, or there are no weights of these formats.
    """
    path = resolve(spec)
    if is_directory(path):
        names = (_WEIGHTS, _INDEX, _OPEN_CLIP_WEIGHTS)
        found = [join(path, file) for file in names if is_file(join(path, file))]
        if not found:
            raise UserError(f"tower {spec} is a directory without {', '.join(names)}; give one with weights")
        path = found[0]
    if not is_file(path):
        raise UserError(f"tower {path} is not a regular file; give a file or a directory")
    if not path.endswith(_SUFFIXES):
        raise UserError(
            f"tower {spec} is {suffix(path) or 'a file without suffix'}; give weights as .npz or .safetensors"
        )
    return path


def weights_digest(path: StrPath) -> str:
    """Return the SHA-256 of weights; of several parts, that of their digests in the order of their names.

    Raises:
      UserError: a file in the Hub's cache has changed since it was downloaded.
    """
    files = [os.fspath(path)] if suffix(path) == ".npz" else parts(path)
    digests = []
    for file in files:
        digests.append(sha256(local_copy(file, in_parts=True)))
        blob = name(absolute(file))  # the Hub's cache names large files by their SHA-256
        if re.fullmatch("[0-9a-f]{64}", blob) and blob != digests[-1]:
            raise UserError(f"{absolute(file)} is damaged; delete it to have it downloaded again")
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@contextmanager
def _absent_path(spec: str) -> Iterator[None]:
    """Add to the error for a repository that a name without a prefix may have been meant as a path."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if ":" in spec else f"{spec} does not exist here, and {error}") from None


def _fetch(snapshot: Snapshot, file: str) -> str:
    return snapshot.fetch(file, None if file.endswith(".safetensors") else _MAX_CONFIG_BYTES)


def _fetch_tower(snapshot: Snapshot, optional: Sequence[str]) -> str:
    try:
        directory = fetch_folder(snapshot, (_CONFIG,), optional)
    except AbsentError as absent:
        try:
            return fetch_folder(snapshot, (_OPEN_CLIP_CONFIG, _OPEN_CLIP_WEIGHTS))
        except AbsentError:
            raise absent from None
    try:
        _fetch(snapshot, _WEIGHTS)
    except AbsentError as absent:
        try:
            index = _fetch(snapshot, _INDEX)
        except AbsentError:
            raise UserError(f"{absent.problem}; choose a repository with .safetensors weights") from None
        for part in parts(index):
            _fetch(snapshot, name(part))
    return directory


def _fetch_tokenizer(snapshot: Snapshot) -> str:
    for file in _TOKENIZERS:
        try:
            return _fetch(snapshot, file)
        except AbsentError:
            continue
    try:
        path = snapshot.fetch("tokenizer.json", _MAX_TOKENIZER_BYTES)
    except AbsentError as absent:
        if offline():
            raise UserError(str(absent)) from None
        names = ", ".join((*_TOKENIZERS, "tokenizer.json"))
        raise UserError(f"{snapshot} has none of {names}; give a sentencepiece model") from None
    model = sentencepiece_model(read_bytes(path), f"{snapshot}/tokenizer.json")
    converted = join(cache_directory(), "tokenizers", f"{hashlib.sha256(model).hexdigest()}.model")
    write_atomic(converted, model)
    return converted


def _fetch_archive(spec: str, family: str, rest: str) -> str:
    """Return a `.npz` of one of Google's buckets, from the cache."""
    known = {t.name: t for t in known_towers()}.get(spec)
    stem = rest.removesuffix(".npz")
    if not known and family == "augreg" and not _AUGREG_FILE.fullmatch(stem):
        raise UserError(f"tower {spec!r} is unknown{_nearest(spec)}; `lit-fast towers` lists names")
    path = known.source if known else f"{BUCKETS[family]}/{stem}.npz"
    if not all(re.fullmatch(_WORD, part) for part in path.split("/")):
        raise UserError(
            f"tower {spec!r} is not the name of a file in a bucket; `lit-fast towers` lists names"
        )
    host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    url = f"{host if '://' in host else f'http://{host}'}".rstrip("/") + f"/{quote(path)}"
    return cached_file(spec, url, join("storage.googleapis.com", path), known.sha256 if known else "")


def _nearest(spec: str) -> str:
    near = get_close_matches(spec, [t.name for t in known_towers()], n=2, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""
