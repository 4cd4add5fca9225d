"""The demo's result as one self-contained HTML page: figures, curves, and pictures found by sentences."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_fast.report.charts import Series, chart
from lit_fast.report.html import bar, document, section
from lit_fast.runs.metrics import curve
from lit_fast.utils.progress import duration

# Metric -> (what it is in words, whether the curves show it).
METRICS = {
    "acc1": ("Name the picture: first guess right", True),
    "image_retrieval_recall@1": ("Sentence to picture: right picture comes first", True),
    "image_retrieval_recall@5": ("Sentence to picture: among the first 5", True),
    "image_retrieval_recall@10": ("Sentence to picture: among the first 10", False),
    "text_retrieval_recall@1": ("Picture to sentence: right sentence comes first", False),
    "text_retrieval_recall@5": ("Picture to sentence: among the first 5", False),
    "text_retrieval_recall@10": ("Picture to sentence: among the first 10", False),
}
_SHORT = {
    "acc1": "named right",
    "image_retrieval_recall@1": "found first",
    "image_retrieval_recall@5": "in the first 5",
}


class Query(NamedTuple):
    """A sentence and the pictures that it found, best first."""

    text: str
    pictures: list[tuple[bytes, bool]]  # image file, whether it is the right one
    rank: int  # position of the right picture, 0 = first
    answer: bytes  # the right picture


class Confusion(NamedTuple):
    """Which class was named for which: `counts[true][named]`."""

    classes: list[str]
    counts: list[list[int]]


def build_page(
    metrics: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    right: Sequence[Query],
    wrong: Sequence[Query],
    confusion: Confusion,
    commands: Sequence[str],
    seconds: float | None,
) -> str:
    """The page.

    Args:
      metrics: lines of metrics.jsonl, training ("step", "loss") and evaluation ("step", "<dataset>/<metric>").
      results: as `lit-fast eval --json` writes them.
      right, wrong: queries for the gallery.
      confusion: of the zero-shot classification.
      commands: what was run, as typed.
      seconds: how long all of it took, None if it was not done in one go.
    """
    losses = curve(list(metrics), "loss")
    parts = [
        _intro(seconds),
        section("What it can do", _figures(results), _FIGURES_NOTE),
        '<section class="pair">',
        f"<div><h2>Loss</h2>{chart([Series('loss', losses)], percent=False)}</div>",
        f"<div><h2>Accuracy while training</h2>{chart(curves(metrics, results), percent=True)}"
        '<p class="note">Dotted: the chance levels.</p></div>',
        "</section>",
        section("Right: the picture it was written for comes first", _gallery(right), _GALLERY_NOTE),
        section("Wrong: another picture comes first", _gallery(wrong), _WRONG_NOTE),
        section("What it calls the shapes", _confusion(confusion), _CONFUSION_NOTE),
        section("The commands", "<pre>" + "\n".join(html.escape(f"$ {c}") for c in commands) + "</pre>"),
    ]
    return document("lit-fast demo", parts, _STYLE)


def _intro(seconds: float | None) -> str:
    took = ""
    if seconds is not None:
        took = f" Drawing, embedding, training and evaluating took {duration(seconds)}."
    return (
        "<header><h1>Pictures found by sentences</h1>"
        "<p>A frozen vision transformer, pretrained on the attributes of such scenes, turned every picture "
        "into a vector once. A text tower then learnt, with the sigmoid loss, to put each sentence near its "
        "picture's vector. "
        "Every figure below is measured on scenes whose combinations of colour and shape occurred in no "
        "picture and no sentence that either tower was trained on: both know purple and both know hearts, "
        f"but they have never met a purple heart.{took}</p></header>"
    )


_FIGURES_NOTE = (
    "The tick on a bar is the chance level: what blind guessing would reach. The interval is over the choice "
    "of scenes, not over trainings."
)
_GALLERY_NOTE = "The five pictures nearest to the sentence, best first; the right one is framed."
_WRONG_NOTE = "The right picture, where it is not among the five, is shown last with the place it came in."
_CONFUSION_NOTE = "Combinations that were never trained on; any colour could be named with any shape."


def _figures(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        known = [m for m in METRICS if m in result["metrics"]]
        counted = [f"{result[k]:,} {k}" for k in ("images", "texts", "classes") if k in result]
        rows.append(
            f'<tr><th colspan="5" scope="rowgroup">{html.escape(result["dataset"])} '
            f'<span class="note">{html.escape(", ".join(counted))}</span></th></tr>'
        )
        for name in known:
            value, chance = result["metrics"][name], result["chance"][name]
            low, high = result["interval_95"][name]
            rows.append(
                f'<tr><td>{html.escape(METRICS[name][0])}</td><td class="number"><strong>{_percent(value)}'
                f'</strong></td><td class="number range">{_percent(low)} to {_percent(high)}</td>'
                f'<td class="number">{_percent(chance)}</td><td class="bars">{bar(value, chance)}</td></tr>'
            )
    return (
        '<div class="scroll"><table class="figures"><thead><tr><th>figure</th><th class="number">reached</th>'
        '<th class="number range">95 % interval</th><th class="number">chance</th><th class="bars"></th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def curves(metrics: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> list[Series]:
    """The evaluations inside the loop as lines, with the chance levels of the results."""
    chances = {f"{r['dataset']}/{m}": c for r in results for m, c in r["chance"].items()}
    out = []
    for name in chances:
        points = [(m["step"], m[name]) for m in metrics if name in m]
        metric = name.rpartition("/")[2]
        if points and METRICS.get(metric, ("", False))[1]:
            out.append(Series(_SHORT[metric], points, chances[name]))
    return out


def _gallery(queries: Sequence[Query]) -> str:
    if not queries:
        return '<p class="note">There is none.</p>'
    cards = []
    for query in queries:
        pictures = [_picture(data, "right" if ok else "") for data, ok in query.pictures]
        if query.rank >= len(query.pictures):
            place = f'<span class="place">no. {query.rank + 1:,}</span>'
            pictures.append(f'<span class="late">{_picture(query.answer, "right")}{place}</span>')
        cards.append(f"<li><p>{html.escape(query.text)}</p><div>{''.join(pictures)}</div></li>")
    return f'<ul class="gallery">{"".join(cards)}</ul>'


def _picture(data: bytes, kind: str) -> str:
    media = "png" if data.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{media};base64,{base64.b64encode(data).decode()}"
    described = "the right picture" if kind else "a retrieved picture"
    return f'<img src="{source}" alt="{described}" class="{kind}" width="64" height="64">'


def _confusion(confusion: Confusion) -> str:
    rows = []
    for number, (name, counts) in enumerate(zip(confusion.classes, confusion.counts, strict=True)):
        total = sum(counts)
        if not total:
            continue
        order = sorted(range(len(counts)), key=lambda k: -counts[k])
        others = [
            f"{confusion.classes[k]} {100 * counts[k] / total:.0f} %"
            for k in order
            if k != number and counts[k]
        ]
        rest = f", {len(others) - 3} more" if len(others) > 3 else ""
        share = counts[number] / total
        rows.append(
            f'<tr><td>{html.escape(name)}</td><td class="number"><strong>{100 * share:.0f} %</strong></td>'
            f"<td>{html.escape(', '.join(others[:3]) + rest)}</td></tr>"
        )
    return (
        '<div class="scroll"><table class="figures names"><thead><tr><th>on the picture</th>'
        '<th class="number">called so</th><th>otherwise called</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_STYLE = """
.names td:first-child { white-space:nowrap }
.gallery { list-style:none; margin:0; padding:0; display:grid; gap:1.2rem 2rem;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr)) }
.gallery p { margin:0 0 .35rem }
.gallery div { display:flex; flex-wrap:wrap; gap:6px; align-items:flex-start }
img { width:72px; height:72px; border-radius:4px; border:3px solid transparent; display:block }
img.right { border-color:var(--good) }
.late { margin-left:.6rem; text-align:center } .place { color:var(--quiet); font-size:.8rem }
@media (max-width:640px) { .figures .range { display:none } img { width:56px; height:56px } }
"""
