"""The class names and prompt templates of a dataset: from its sources, from files, or ImageNet's.

The number of a class is the position of its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lit_fast.data.dataset import Dataset, Source
from lit_fast.embed.sources.columns import some
from lit_fast.embed.sources.formats import OwnClassNames, own_class_names
from lit_fast.errors import UserError
from lit_fast.evaluation.imagenet_classes import imagenet_names, imagenet_templates
from lit_fast.evaluation.zeroshot import canonical_names, canonical_templates
from lit_fast.storage.text_files import read_lines
from lit_fast.utils.output import status

_WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)
_ID = re.compile(
    r"n\d{8}|(class|cls|label|category|cat|id)?[ _.-]*\d+|(?=.*\d)[0-9a-f]{6,}"
    r"|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    re.ASCII | re.IGNORECASE,
)
_NUMBERED = re.compile(r"(n\d{8})\s+\d+\s+(\S+)", re.ASCII)  # a line of ImageNet's map_clsloc.txt


class ClassNames(NamedTuple):
    """The names of classes by their numbers, and prompt templates for them."""

    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassOptions:
    """Options of `index`: a file; "" declines what would be guessed, None guesses."""

    classnames: str | None = None
    templates: str | None = None


def find_class_names(sources: Sequence[Source], options: ClassOptions, old: Dataset | None) -> ClassNames:
    """Return the class names and prompt templates that all sources have in common; none if some have none.

    Args:
      sources: `kind` of each is the name of its format.
      options: files that replace the names and templates of the sources.
      old: the dataset that grows.

    Raises:
      UserError: a file does not fit, or two sources, or one and `old`, have other names, so that labels would mean
        something else.
    """
    found: dict[ClassNames, str] = {}  # names, templates -> a report
    paths: dict[tuple[str, ...], str] = {}  # names -> the first source that has them
    for own in own_class_names(sources):
        classes, report = _resolve(own, options)
        paths.setdefault(classes.names, own.path)
        if old is not None and old.classnames and classes.names != old.classnames:
            raise UserError(
                f"{own.path} has other class names than {old.path}; index it as a dataset of its own"
            )
        found.setdefault(classes, report)
    named = [path for names, path in paths.items() if names]
    if len(named) > 1:
        raise UserError(
            f"{named[0]} and {named[1]} have different class names, so that a class number has two meanings; "
            "index each as a dataset of its own"
        )
    if old is not None and old.classnames:
        return ClassNames(old.classnames, old.templates)
    if len(found) > 1 or old is not None:
        if any(any(classes) for classes in found):
            status(
                "warning: some sources have no class names, or other templates, so none are stored; "
                "their labels may mean different classes"
            )
        return ClassNames()
    [(classes, report)] = found.items()
    ids = [name for name in classes.names if _ID.fullmatch(name)]
    if report:
        status(report)
    elif options.classnames is None and len(ids) > len(classes.names) / 2:
        status(
            f"warning: class names look like ids or numbers ({some(ids[:3])}, ...) and become part of prompts; "
            "name the classes with --classnames FILE"
        )
    return classes


def check_same_names(sources: Sequence[Source], options: ClassOptions, old: Dataset) -> None:
    """Raise UserError if `options` name other class names or templates than a dataset of these sources has."""
    if options == ClassOptions():
        return
    for own in own_class_names(sources):
        classes, _ = _resolve(own, options)
        if classes != (old.classnames, old.templates):
            raise UserError(
                f"{old.path} is already a dataset, with other class names or templates; choose another --out, "
                "or give them to lit-fast eval"
            )


def check_labels(labels: Collection[int], names: Sequence[str]) -> None:
    """Check that class numbers start where the names start.

    Args:
      labels: the distinct class numbers of the rows, also of those that are left out.
      names: the class names.

    Raises:
      UserError: the class numbers run from 1 to the number of names.
    """
    if names and labels and min(labels) == 1 and max(labels) == len(names):
        raise UserError(
            f"labels run from 1 to {len(names)}, but the {len(names)} class names are numbered from 0 "
            f"(0 is {names[0]}); subtract 1 from the labels, or put a name for class 0 in front with --classnames"
        )


def report_labels(labels: Collection[int], names: Sequence[str]) -> None:
    """Warn of class names without a row, and of labels without class names; see `check_labels`."""
    if labels and not names:
        status(
            "warning: there are labels but no class names, which zero-shot classification needs; "
            "give --classnames FILE, one name per line"
        )
    unused = [name for number, name in enumerate(names) if number not in labels]
    if unused:
        status(f"warning: {len(unused):,} of {len(names):,} class names have no row: {some(unused)}")


def _resolve(own: OwnClassNames, options: ClassOptions) -> tuple[ClassNames, str]:
    """Return the names and templates of one directory, and a line about them ("" = they are its own)."""
    names, templates, known = own.keys, own.templates, imagenet_names()
    if options.classnames:
        names = _match(_read(options.classnames, canonical_names), options.classnames, own)
    elif options.classnames is None and own.classnames:
        names = _match(own.classnames, f"classnames.txt beside {own.path}", own)
    if options.templates:
        templates = _read(options.templates, canonical_templates)
    elif options.templates is not None:
        templates = ()
    ids = [name for name in own.keys or names if _WORDNET_ID.fullmatch(name)]
    report = ""
    if options.classnames:
        first = own.keys[0] if own.keys else 0
        report = f"class names: {len(names):,} from {options.classnames} ({first} is {names[0]})"
    if options.classnames == "" or len(ids) < len(names) or known.keys().isdisjoint(ids):
        return ClassNames(names, templates), report
    if not report:
        names = tuple(known.get(name, name) for name in names)
        unknown = [name for name in ids if name not in known]
        report = f"class names: ImageNet's for {len(ids) - len(unknown):,} WordNet ids"
    else:
        unknown = []
    if options.templates is None and not templates:
        templates = imagenet_templates()
        report += f", and the {len(templates)} prompt templates"
    if unknown:
        report += (
            f"; {len(unknown):,} ids are not of ImageNet-1k and have no name: {some(unknown)}; "
            "name them with --classnames FILE"
        )
    return ClassNames(names, templates), report


def _match(lines: tuple[str, ...], file: str, own: OwnClassNames) -> tuple[str, ...]:
    """Return the names in the lines of a file by the keys that a source has for its classes, or else by position.

    A line is a name, or a key, a tab and a name. After an id or a number a space will do, as in ImageNet's files:
    `n01440764 tench, Tinca tinca`, `n02119789 1 kit_fox`.
    """
    keys, pairs = own.keys, [_split(line) for line in lines]
    by_key = {key: name for key, name in pairs if name}
    missing = [key for key in keys if key not in by_key]
    if keys and not missing:
        return tuple(by_key[key] for key in keys)
    if len(missing) < len(keys) / 2:
        raise UserError(
            f"{file} has no name for {len(missing):,} of the {len(keys):,} classes of {own.path} ({some(missing)}); "
            "add lines for them"
        )
    if not keys:
        return _in_order(lines, pairs, file)
    if len(lines) != len(keys):
        raise UserError(
            f"{file} has {len(lines):,} names, but {own.path} has {len(keys):,} classes ({some(keys[:3])}, ...); "
            "give one name per class, or a class and its name per line, with --classnames"
        )
    if all(re.fullmatch(r"\d{1,18}", key, re.ASCII) for key in keys):
        # Folders 0, 1, 10, 11, 2 are sorted as texts, the lines of a file by their numbers.
        rank = {key: i for i, key in enumerate(sorted(keys, key=int))}
        return tuple(lines[rank[key]] for key in keys)
    return lines


def _split(line: str) -> tuple[str, str]:
    """Return the key and the name of a line, of which one may be empty."""
    if match := _NUMBERED.fullmatch(line):
        return match[1], match[2].replace("_", " ")
    key, tab, name = line.partition("\t")
    if not tab:
        key, _, name = line.partition(" ")
        if not _ID.fullmatch(key):
            return line, ""
    return key.strip(), name.strip()


def _in_order(lines: tuple[str, ...], pairs: list[tuple[str, str]], file: str) -> tuple[str, ...]:
    """Return the names of classes without keys: the lines, or their names if they begin with keys."""
    keys = [key for key, name in pairs if name]
    if len(keys) < len(lines):
        return lines
    if all(map(_WORDNET_ID.fullmatch, keys)):
        if keys != sorted(keys):
            raise UserError(
                f"{file} has WordNet ids in another order than sorted, so that class numbers are ambiguous; "
                "give one name per line, in the order of the class numbers"
            )
        return tuple(name for _, name in pairs)
    numbers = {int(key): name for key, name in pairs if re.fullmatch(r"\d{1,9}", key, re.ASCII)}
    if numbers.keys() == set(range(len(lines))):
        return tuple(numbers[number] for number in range(len(lines)))
    return lines


def _read(file: str, check: Callable[[Sequence[str]], list[str]]) -> tuple[str, ...]:
    lines = read_lines(file)
    try:
        check(lines)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return lines
