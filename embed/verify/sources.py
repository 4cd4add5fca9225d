"""Check that the sources of a dataset still are the files that were indexed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from lit_fast.data.dataset import Dataset, Source
from lit_fast.data.images.reader import ChangedSourceError, sample_images
from lit_fast.data.images.sources import find_change, find_other_content
from lit_fast.embed.verify.findings import Finding, some
from lit_fast.errors import UserError

_PART = "sources"
_REMEDY = "restore them, or index the sources as a new dataset"


def verify_sources(dataset: Dataset, sample: int) -> Iterator[Finding]:
    """Yield a finding for the sources that have changed, a note for those that cannot be read.

    Args:
      dataset: the dataset.
      sample: number of evenly spaced rows whose image files are compared.
    """
    sources = [source for source in dataset.sources if source.kind not in ("features", "noise")]
    with ThreadPoolExecutor(16) as pool:
        states = list(pool.map(_state, sources))
    changed = [f"{s.path} {change}" for s, (change, _) in zip(sources, states, strict=True) if change]
    unreadable = [problem for _, problem in states if problem]
    if changed:
        yield Finding(_PART, f"{len(changed):,} changed: {some(changed)}", _REMEDY)
    relocate = f"if they have moved: lit-fast index --relocate OLD=NEW {dataset.path}"
    if unreadable:
        yield Finding(_PART, f"{len(unreadable):,} not read: {some(unreadable)}", relocate, wrong=False)
    if changed or unreadable or not sample:
        return
    try:
        found = sample_images(dataset, sample, archives=True)
    except ChangedSourceError as error:
        yield Finding(_PART, str(error))
        return
    except (UserError, ValueError, TypeError, KeyError, IndexError):  # an index record: a finding of its own
        return
    if found.changed:
        of = f"{len(found.changed):,} of {found.read:,} sampled images changed"
        yield Finding(_PART, f"{of}: {some(found.changed)}", _REMEDY)
    if found.missing:
        of = f"{len(found.missing):,} of {found.read:,} sampled images not read"
        yield Finding(_PART, f"{of}: {some(found.missing)}", relocate, wrong=False)


def _state(source: Source) -> tuple[str, str]:
    """Return how a source has changed, and why it cannot be read."""
    try:
        # The digest is compared also where the time is the recorded one, unlike before embedding.
        return find_change(source) or find_other_content(source), ""
    except UserError as error:
        return "", str(error)
