"""README.md of a pushed dataset: its contents, its sources, the commands that train from it."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence

from lit_fast.data.dataset import Dataset
from lit_fast.data.features import Features
from lit_fast.data.images.sources import absent_places
from lit_fast.data.tokens import Tokens
from lit_fast.embed.share.contents import Places
from lit_fast.storage.paths import ELSEWHERE, name, parent
from lit_fast.utils.format import format_bytes

MARK = "<!-- written by lit-fast push; delete this line to keep your own text -->"

_SHOWN = 20  # sources


def write_card(
    repository: str,
    dataset: Dataset,
    features: Sequence[Features],
    tokens: Sequence[Tokens],
    places: Places,
    licence: str,
) -> str:
    """Return the text of README.md.

    Args:
      licence: an identifier as the Hub has them, "" = unknown.
    """
    own = repository.rpartition("/")[2]
    absent = absent_places([places.hide_source(source) for source in dataset.sources])
    lines = [
        "---",
        f"license: {licence or 'unknown'}",
        "tags: [lit_fast, image-text]",
        "viewer: false",
        "---",
        MARK,
        "",
        f"# {_plain(own)}",
        "",
        f"A dataset of lit_fast: {dataset.rows:,} rows with {dataset.captions:,} captions, and the features of frozen "
        "vision towers. The images are not in this repository.",
        "",
        "## Train from it",
        "",
        "```sh",
        f"lit-fast pull {repository} {own}",
        f"lit-fast train siglit_b8_one_day --workdir runs/{own} --dataset {own}{_choice(features, tokens)}",
        "```",
    ]
    if not tokens:
        lines += ["", f"Before it, make tokens: `lit-fast tokenize {own} --train-vocab 32000`."]
    lines += [
        "",
        "## Features",
        "",
        "| tower | width | views | valid rows | made with |",
        "|---|---|---|---|---|",
    ]
    for store in features:
        made = places.hide(str(store.provenance["source"]))
        made = "imported" if "imported" in store.provenance else made
        valid = dataset.rows - len(store.invalid_rows())
        lines.append(
            f"| {_plain(store.tower)} | {store.width} | {store.views} | {valid:,} | {_plain(made)} |"
        )
    lines += ["", "## Tokens", "", "| tokenizer | pieces | tokens per caption, at most |", "|---|---|---|"]
    lines += [f"| {_plain(t.name)} | {t.meta['vocab_size']:,} | {t.meta['max_length']} |" for t in tokens]
    lines += ["", "## Sources", "", f"{len(dataset.sources):,} files or directories:", ""]
    lines += _sources(dataset, places)
    if dataset.left_out:
        lines += ["", "Rows of the sources that are not in the dataset:", ""]
        lines += [f"- {count:,}: {_plain(reason)}" for reason, count in dataset.left_out.items()]
    if absent:
        lines += [
            "",
            f"`{ELSEWHERE}N/...` are files of the machine that pushed the dataset. If you have them, connect",
            "them; then another tower can embed the images:",
            "",
            f"    lit-fast index --relocate {absent[0]}=DIRECTORY {own}",
        ]
    lines += [
        "",
        "## Licence",
        "",
        f"{_plain(licence) if licence else 'Unknown: nobody has stated one'}. Captions and images have the licences of "
        "their sources, features also that of the tower; clear them before you publish anything made of them.",
        "",
    ]
    return "\n".join(lines)


def _choice(features: Sequence[Features], tokens: Sequence[Tokens]) -> str:
    """Return the options that choose a store where there are several."""
    tower = f" --tower {features[0].tower}" if len(features) > 1 else ""
    return tower + (f" --tokenizer {shlex.quote(tokens[0].name)}" if len(tokens) > 1 else "")


def _sources(dataset: Dataset, places: Places) -> list[str]:
    counts, sizes, first = Counter[str](), Counter[str](), dict[str, str]()
    for source in dataset.sources:
        path = places.hide(source.path)
        place = f"{parent(path)}/" if path.count("/") > 2 else path
        counts[place] += 1
        sizes[place] += source.bytes
        first.setdefault(place, name(path))
    lines = []
    for place, count in list(counts.items())[:_SHOWN]:
        files = f": {count:,} files, first {_plain(first[place])}" if count > 1 else ""
        files = files or (f": {_plain(first[place])}" if place.endswith("/") else "")
        size = f", {format_bytes(sizes[place])}" if sizes[place] else ""
        lines.append(f"- {_plain(place)}{files}{size}")
    if len(counts) > _SHOWN:
        lines.append(f"- and {len(counts) - _SHOWN:,} more places")
    return lines


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    text = re.sub(r"\s+", " ", text if text.isprintable() else ascii(text)[1:-1])
    return "`" + text.replace("`", "'").replace("|", "/") + "`" if text else ""
