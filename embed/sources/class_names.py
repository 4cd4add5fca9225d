"""The class names and prompt templates of the sources to index."""

from __future__ import annotations

from collections.abc import Sequence

from lit_fast.data.dataset import Source
from lit_fast.embed.sources.benchmark import lines_near
from lit_fast.embed.sources.formats import FORMATS
from lit_fast.storage.paths import parent


def class_names(sources: Sequence[Source]) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the different pairs (class names, prompt templates) of the sources' directories.

    They are the lines of `classnames.txt` and `zeroshot_classification_templates.txt` beside a source or one level up,
    as CLIP_benchmark has them. Without the former, the class names are those that the first source of a directory has
    by its format. `kind` of each source must be the name of its format.
    """
    first: dict[str, Source] = {}
    for source in sources:
        first.setdefault(_directory(source), source)
    return {
        (
            lines_near(directory, "classnames.txt") or FORMATS[source.kind].class_names(source.path),
            tuple(filter(None, lines_near(directory, "zeroshot_classification_templates.txt"))),
        )
        for directory, source in first.items()
    }


def _directory(source: Source) -> str:
    if source.kind == "noise":  # there is no file
        return ""
    return source.path if source.kind == "folder" else parent(source.path)
