"""The files of a dataset as they are pushed. Paths of this machine and secrets in URLs are replaced.

The path of a local source becomes `elsewhere://N/NAME`: N numbers the directories, NAME is the name of the file.
`lit-fast index --relocate elsewhere://N=DIR D` connects a pulled dataset to the images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from lit_fast.data.dataset import Dataset, Source, generation_directory
from lit_fast.data.features import Features
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.storage.files import is_file, list_names
from lit_fast.storage.paths import ELSEWHERE, is_url, join, name, parent
from lit_fast.storage.text_files import json_bytes, read_json, read_text


@dataclass(frozen=True)
class Places:
    """The names of the sources' places for other machines."""

    numbers: dict[str, int]  # directory -> its number from 1 on

    @classmethod
    def of(cls, dataset: Dataset) -> Places:
        """Number the directories of a dataset's sources in their order, after numbers that it was pulled with."""
        places = [place for s in dataset.sources for place in (parent(s.path), s.images)]
        local = dict.fromkeys(place for place in places if place.startswith("/"))
        pulled = [int(m[1]) for p in places if (m := re.match(rf"{ELSEWHERE}(\d{{1,9}})(/|$)", p))]
        return cls({directory: number for number, directory in enumerate(local, 1 + max(pulled, default=0))})

    def hide(self, location: str) -> str:
        """Return a path or URL as it is pushed; other texts are unchanged."""
        if location in self.numbers:
            return f"{ELSEWHERE}{self.numbers[location]}"
        if location.startswith(("/", "~")):
            directory = parent(location)
            known = directory in self.numbers
            return f"{ELSEWHERE}{self.numbers[directory]}/{name(location)}" if known else name(location)
        return _without_secrets(location) if is_url(location) else location

    def hide_source(self, source: Source) -> Source:
        """Return a source as it is pushed."""
        names = (option.partition("=") for option in source.names)
        return replace(
            source,
            path=self.hide(source.path),
            images=self.hide(source.images),
            modified=0,
            names=tuple(f"{option}{equals}{self.hide(value)}" for option, equals, value in names),
        )

    def hide_all(self, value: Any) -> Any:
        """Return a JSON value with `hide` of all its texts."""
        if isinstance(value, dict):
            return {key: self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide_all(item) for item in value]
        return self.hide(value) if isinstance(value, str) else value


def dataset_files(
    dataset: Dataset, features: Sequence[Features], tokens: Sequence[Tokens], places: Places
) -> dict[str, str | bytes]:
    """Return the files of a dataset with some of its stores: relative path -> local path or content.

    Raises:
      UserError: one is missing.
    """
    files: dict[str, str | bytes] = {}

    def add(directory: str, names: Sequence[str]) -> None:
        for file in names:
            path = f"{directory}/{file}"
            files[path] = join(dataset.path, path)

    for kind in ("index", "captions"):
        directory = name(generation_directory(dataset.path, kind, dataset.generation))
        add(directory, _records(join(dataset.path, directory)))
    for store in tokens:
        add(f"tokens/{store.name}", ["tokenizer.model", *_records(store.path)])
        files[f"tokens/{store.name}/tokens.json"] = json_bytes(places.hide_all(store.meta))
    for features_store in features:
        directory = f"features/{features_store.tower}"
        shards = range(dataset.shards)
        add(directory, ["zarr.json", *(f"c/{shard}/0" for shard in shards)])
        add(directory, [f"manifest/{shard:05d}.json" for shard in shards])
        files[f"{directory}/tower.json"] = json_bytes(places.hide_all(features_store.provenance))
    for file in list_names(dataset.path):
        if file.startswith("left_out") and file.endswith(".jsonl"):
            files[file] = _left_out(join(dataset.path, file), places)
    if absent := [
        path for path, content in files.items() if isinstance(content, str) and not is_file(content)
    ]:
        raise UserError(f"{join(dataset.path, absent[0])} is missing; run: lit-fast verify {dataset.path}")
    value = read_json(join(dataset.path, "dataset.json"))
    value["sources"] = [
        {key: item for key, item in vars(places.hide_source(source)).items() if item or key == "bytes"}
        for source in dataset.sources
    ]
    files["dataset.json"] = json_bytes(value)
    return files


def _records(directory: str) -> list[str]:
    return [file for file in list_names(directory) if file.endswith(".array_record")]


def _left_out(path: str, places: Places) -> bytes:
    lines = (read_text(path, limit=1 << 30) or "").splitlines()
    try:
        return "".join(f"{json.dumps(places.hide_all(json.loads(line)))}\n" for line in lines).encode()
    except ValueError:
        raise UserError(f"{path} is damaged; delete it") from None


def _without_secrets(url: str) -> str:
    """Return a URL without user, password and, over HTTP, the query, which may be a signature."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{ELSEWHERE}{name(url)}"
    host = parts.netloc.rpartition("@")[2] if parts.scheme != "hf" else parts.netloc
    query = "" if parts.scheme in ("http", "https") else parts.query
    return parts._replace(netloc=host, query=query).geturl()
