"""Finds the tars of an evaluation set in CLIP_benchmark's layout: a directory, a URL or a name on the Hub.

    classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt
    test/nshards.txt            how many tars there are
    test/0.tar, test/1.tar, ...

The split is `test`, as CLIP_benchmark takes it. The layout is its `build_wds_dataset`.
"""

from __future__ import annotations

import os
import re

from lit_fast.errors import UserError
from lit_fast.evaluation.known_sets import known_evaluations
from lit_fast.storage import remote
from lit_fast.storage.download import MAX_BYTES, is_whole
from lit_fast.storage.files import read_object
from lit_fast.storage.hub import Commit, cache_directory
from lit_fast.storage.paths import parent
from lit_fast.storage.read import beside

PREFIX = "wds:"
_MAX_SHARDS = 100_000
_MAX_TEXT = 16 << 20  # bytes
_TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
_COUNT = "test/nshards.txt"


def benchmark_tars(directory: str) -> list[str]:
    """The tars of a directory or URL in this layout; [] if it has another.

    Raises:
      UserError: a local tar is missing.
    """
    directory = directory.rstrip("/")
    text = beside(f"{directory}/test", "nshards.txt", limit=1000)
    if text is None:
        return []
    tars = [f"{directory}/{name}" for name in _tars(f"{directory}/{_COUNT}", text)]
    missing = [tar for tar in tars if not remote.is_remote(tar) and not os.path.isfile(tar)]
    if missing:
        raise UserError(f"{missing[0]} is missing: {directory}/{_COUNT} says that there are {len(tars)} tars")
    return tars


def hub_tars(spec: str) -> list[str]:
    """The tars of `wds:NAME`, the repository clip-benchmark/wds_NAME of the Hugging Face Hub, in the cache.

    What is in the cache is used without asking the server again; the rules are those of `lit_fast.storage.hub`.

    Raises:
      UserError: no such set, it cannot be downloaded, or it is not what it is known to be.
    """
    name = spec.removeprefix(PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII):
        raise UserError(f"source {spec} is not of the form wds:NAME{_known()}")
    repository = f"datasets/clip-benchmark/wds_{name.replace('/', '-')}"
    directory = cache_directory() / "huggingface" / repository / "main"
    whole = directory / "files.json"
    files = read_object(whole, files=list).get("files", []) if whole.exists() else []
    if not (files and all(isinstance(file, str) and is_whole(directory / file) for file in files)):
        commit = Commit(spec, repository, "main", directory)
        try:
            commit.fetch(_COUNT, max_bytes=_MAX_TEXT)
        except UserError as error:
            raise UserError(f"{error}{'' if name in known_evaluations() else _known()}") from None
        tars = _tars(str(directory / _COUNT), (directory / _COUNT).read_text("utf-8", "replace"))
        files = [_COUNT, *(text for text in _TEXTS if commit.fetch(text, may_lack=True, max_bytes=_MAX_TEXT))]
        files += [tar for tar in tars if commit.fetch(tar, max_bytes=MAX_BYTES)]
        commit.write(whole, files)
    _check_classes(spec, name, str(directory))
    return benchmark_tars(str(directory))


def _tars(file: str, text: str) -> list[str]:
    if not (re.fullmatch(r"\s*\d{1,6}\s*", text, re.ASCII) and 0 < int(text) <= _MAX_SHARDS):
        raise UserError(f"{file} says {text.strip()[:40]!r}, which is no number of tars")
    return [f"test/{number}.tar" for number in range(int(text))]


def _check_classes(spec: str, name: str, directory: str) -> None:
    expected = known_evaluations().get(name, {}).get("classes")
    if expected is None:
        return
    have = len((beside(directory, _TEXTS[0]) or "").rstrip().splitlines())
    if have != expected:
        raise UserError(f"{spec} has {have} class names in {directory}/{_TEXTS[0]}, not {expected}")


def _known() -> str:
    sets = [key for key, row in known_evaluations().items() if row["task"] != "labels"]
    return f"; known names: {', '.join(sets)}"


def lines_near(directory: str, file: str) -> tuple[str, ...]:
    """Return the lines of a file in a directory or one level up; () if there is none or `directory` is ""."""
    text = beside(directory, file) if directory else None
    if text is None and directory:
        text = beside(parent(directory), file)
    return tuple(line.strip() for line in (text or "").rstrip().splitlines())
