"""Find the tars of an evaluation set in CLIP_benchmark's layout.

The set is a directory, a URL or a name on the Hub:

    classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt
    test/nshards.txt            number of tars
    test/0.tar, test/1.tar, ...

The split is `test`, as CLIP_benchmark takes it. The layout is that of its `build_wds_dataset`.
"""

from __future__ import annotations

import re
from contextlib import suppress

from lit_fast.errors import UserError
from lit_fast.evaluation.known_sets import known_evaluations
from lit_fast.storage.files import is_file, read_bytes
from lit_fast.storage.hub import AbsentError, Snapshot
from lit_fast.storage.paths import is_url, join, parent
from lit_fast.storage.text_files import read_text

PREFIX = "wds:"
_MAX_SHARDS = 100_000
_MAX_TEXT = 16 << 20  # bytes
_TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
_COUNT = "test/nshards.txt"


def benchmark_tars(directory: str) -> list[str]:
    """Return the tars of a directory or URL in this layout; [] if it has another.

    Raises:
      UserError: a local tar is missing.
    """
    directory = directory.rstrip("/")
    text = read_text(f"{directory}/{_COUNT}", limit=1000)
    if text is None:
        return []
    tars = [f"{directory}/{name}" for name in _tars(f"{directory}/{_COUNT}", text)]
    missing = [tar for tar in tars if not is_url(tar) and not is_file(tar)]
    if missing:
        raise UserError(
            f"{missing[0]} is missing, of the {len(tars)} tars in {directory}/{_COUNT}; restore it"
        )
    return tars


def hub_tars(spec: str) -> list[str]:
    """Download the tars of `wds:NAME` to the cache of the Hub and return their paths.

    The repository is clip-benchmark/wds_NAME.

    Raises:
      UserError: there is no such set, it cannot be downloaded, or it has another number of classes than is known.
    """
    name = spec.removeprefix(PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII):
        raise UserError(f"source {spec} is not of the form wds:NAME{_known()}")
    snapshot = Snapshot(f"clip-benchmark/wds_{name.replace('/', '-')}", repo_type="dataset")
    try:
        count = snapshot.fetch(_COUNT, _MAX_TEXT)
    except UserError as error:
        raise UserError(f"{spec}: {error}{'' if name in known_evaluations() else _known()}") from None
    directory = count.removesuffix(f"/{_COUNT}")
    for text in _TEXTS:
        with suppress(AbsentError):
            snapshot.fetch(text, _MAX_TEXT)
    for tar in _tars(count, read_bytes(count).decode("utf-8", "replace")):
        snapshot.fetch(tar)
    _check_classes(spec, name, directory)
    return benchmark_tars(directory)


def lines_near(directory: str, file: str) -> tuple[str, ...]:
    """Return the lines of a file in a directory or one level up; () if there is none."""
    if not directory:
        return ()
    text = read_text(join(directory, file))
    if text is None:
        text = read_text(join(parent(directory), file))
    return tuple(line.strip() for line in (text or "").rstrip().splitlines())


def _tars(file: str, text: str) -> list[str]:
    if not (re.fullmatch(r"\s*\d{1,6}\s*", text, re.ASCII) and 0 < int(text) <= _MAX_SHARDS):
        raise UserError(f"{file} holds {text.strip()[:40]!r}, which is not a number of tars; restore it")
    return [f"test/{number}.tar" for number in range(int(text))]


def _check_classes(spec: str, name: str, directory: str) -> None:
    expected = known_evaluations().get(name, {}).get("classes")
    if expected is None:
        return
    found = len((read_text(join(directory, _TEXTS[0])) or "").rstrip().splitlines())
    if found != expected:
        raise UserError(
            f"{spec} has {found} class names in {directory}/{_TEXTS[0]}, not {expected}; delete the directory, then "
            "rerun the same command"
        )


def _known() -> str:
    sets = [key for key, row in known_evaluations().items() if row["task"] != "labels"]
    return f"; choose from {', '.join(sets)}"
