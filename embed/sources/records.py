"""Reads array_record files of `tf.train.Example`, as TensorFlow Datasets writes them.

`features.json` beside says which feature is an image, `<label>.labels.txt` what the classes are called.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lit_fast.data.images.tf_examples import ERRORS, ExampleError, open_records, parse_example
from lit_fast.embed.sources.fields import LABEL, Fields, choose, guess, key_text, texts
from lit_fast.embed.sources.items import Damage, Item, Layout, LeftOut, Names, Sample
from lit_fast.storage.read import beside, folder, name

_RECORDS = 64  # read at a time


def read_records(path: str, names: Names) -> Iterator[Item]:
    """One row per record; one without a key is called by its file and number.

    Raises:
      UserError: the records lack a feature, or the file cannot be read.
    """
    fields: Fields | None = None
    try:
        reader = open_records(path)
        count = reader.num_records()
    except ERRORS:
        yield Damage(f"{path} is damaged or is not an array_record file")
        return
    first = 0
    try:
        while first < count:
            records = reader.read(first, min(first + _RECORDS, count))
            for number, record in enumerate(records, first):
                try:
                    values = parse_example(bytes(record))
                except ExampleError as error:
                    yield LeftOut(_own_key(path, number), f"not a tf.train.Example ({error})")
                    continue
                if fields is None:
                    fields = _choose(path, names, values)
                    yield Layout("array_record", image=fields.image)
                yield _item(path, number, values, fields)
            first += len(records)
            if not records:
                raise ValueError("no records where some should be")
    except ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        yield Damage(f"{path} is damaged at record {first} or after: the rest of it is not read ({reason})")


def class_names(path: str) -> tuple[str, ...]:
    """The lines of the one `<label>.labels.txt` beside that belongs to a feature; () without."""
    for feature in dict.fromkeys([*_typed(path).get("ClassLabel", []), *LABEL]):
        if "/" not in feature and (text := beside(folder(path), f"{feature}.labels.txt")):
            return tuple(line.strip() for line in text.splitlines() if line.strip())
    return ()


def _item(path: str, number: int, values: dict[str, Any], fields: Fields) -> Item:
    captions, languages, label, problem = texts(values, fields)
    key, wrong = key_text(values.get(fields.key)) if fields.key else (_own_key(path, number), "")
    image = values.get(fields.image)
    if not problem and not (image and isinstance(image[0], bytes) and image[0]):
        problem = f"no image in {fields.image}"
    if problem or wrong:
        return LeftOut(key or _own_key(path, number), wrong or problem)
    return Sample(key, number, 0, captions, label, languages)


def _own_key(path: str, number: int) -> str:
    return f"{name(folder(path))}/{name(path)}/{number}"


def _choose(path: str, names: Names, values: dict[str, Any]) -> Fields:
    columns, typed = list(values), _typed(path)
    image = names.image or guess(typed.get("Image", []), columns)
    label = names.label or guess(typed.get("ClassLabel", []), columns)
    return choose(Names(names.captions, image, names.key, label, names.language), columns, path)


def _typed(path: str) -> dict[str, list[str]]:
    """Kind of feature ("Image", "ClassLabel") -> names, lower-case, of TFDS's features.json."""
    found: dict[str, list[str]] = {}
    try:
        value = json.loads(beside(folder(path), "features.json") or "{}")
        for feature, described in value["featuresDict"]["features"].items():
            kind = str(described["pythonClassName"]).rpartition(".")[2]
            found.setdefault(kind, []).append(feature.lower())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return found
    return found
