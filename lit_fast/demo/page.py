"""The demo's result as one self-contained HTML page: figures, curves, and pictures found by sentences."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from lit_fast.progress import duration

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


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    points: list[tuple[float, float]]
    chance: float | None = None


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
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    parts = [
        _intro(seconds),
        _section("What it can do", _figures(results), _FIGURES_NOTE),
        '<section class="pair">',
        f"<div><h2>Loss</h2>{chart([Series('loss', losses)], percent=False)}</div>",
        f"<div><h2>Accuracy while training</h2>{chart(curves(metrics, results), percent=True)}"
        '<p class="note">Dotted: the chance levels.</p></div>',
        "</section>",
        _section("Right: the picture it was written for comes first", _gallery(right), _GALLERY_NOTE),
        _section("Wrong: another picture comes first", _gallery(wrong), _WRONG_NOTE),
        _section("What it calls the shapes", _confusion(confusion), _CONFUSION_NOTE),
        _section("The commands", "<pre>" + "\n".join(html.escape(f"$ {c}") for c in commands) + "</pre>"),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>lit-fast demo</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


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


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>"


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
            bar = (
                f'<div class="bar"><i style="width:{100 * value:.1f}%"></i>'
                f'<b style="left:{100 * chance:.1f}%"></b></div>'
            )
            rows.append(
                f'<tr><td>{html.escape(METRICS[name][0])}</td><td class="number"><strong>{_percent(value)}'
                f'</strong></td><td class="number range">{_percent(low)} to {_percent(high)}</td>'
                f'<td class="number">{_percent(chance)}</td><td class="bars">{bar}</td></tr>'
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


def chart(series: Sequence[Series], *, percent: bool) -> str:
    """Lines over steps as inline SVG; the vertical axis starts at zero, dashes mark chance levels."""
    width, height, left, right, top, bottom = 480, 290, 52, 104 if percent else 52, 14, 36
    series = [s._replace(points=[(x, y) for x, y in s.points if math.isfinite(y)]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return '<p class="note">Nothing was recorded.</p>'
    steps = max(x for s in series for x, _ in s.points)
    high = 1.0 if percent else _nice(max(y for s in series for _, y in s.points))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * x / max(steps, 1),
            height - bottom - (height - top - bottom) * min(y, high) / high,
        )

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_described(series, percent)}">']
    for k in range(5):
        value = high * k / 4
        y = at(0, value)[1]
        label = f"{100 * value:.0f} %" if percent else f"{value:g}"
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x, label = at(share * steps, 0)[0], f"{share * steps:,.0f}" + (" steps" if share == 1 else "")
        out.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="{anchor}">{label}</text>')
    labels = _apart([at(*s.points[-1])[1] for s in series], 15)
    for number, (line, label_y) in enumerate(zip(series, labels, strict=True), 1):
        points = [at(x, y) for x, y in line.points]
        if line.chance is not None:
            (x1, y1), (x2, _) = at(0, line.chance), at(steps, line.chance)
            tip = f"<title>chance, {line.name}: {_percent(line.chance)}</title>"
            out.append(
                f'<line class="chance s{number}" x1="{x1}" x2="{x2}" y1="{y1:.1f}" y2="{y1:.1f}">{tip}</line>'
            )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline class="line s{number}" points="{path}"/>')
        if len(points) <= 40:
            for (x, y), (step, value) in zip(points, line.points, strict=True):
                shown = _percent(value) if percent else f"{value:.4g}"
                tip = f"<title>step {step:,.0f}: {line.name} {shown}</title>"
                out.append(f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{tip}</circle>')
        text = line.name if percent else f"{line.points[-1][1]:.3g}"
        out.append(
            f'<text class="name s{number}" x="{width - right + 8}" y="{label_y + 4:.1f}">{html.escape(text)}</text>'
        )
    return "".join(out) + "</svg>"


def _described(series: Sequence[Series], percent: bool) -> str:
    last = [
        f"{s.name} {_percent(s.points[-1][1]) if percent else format(s.points[-1][1], '.4g')}" for s in series
    ]
    return html.escape("Over the steps of training; at the end: " + ", ".join(last), quote=True)


def _nice(value: float) -> float:
    """The next round number that four equal parts divide well."""
    magnitude = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(m * magnitude for m in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if m * magnitude >= value)


def _apart(positions: Sequence[float], least: float) -> list[float]:
    """The positions, moved down where they are closer than `least`."""
    out = list(positions)
    order = sorted(range(len(out)), key=lambda i: out[i])
    for above, below in pairwise(order):
        out[below] = max(out[below], out[above] + least)
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
:root { --ground:#fcfcfb; --text:#1a1a19; --quiet:#5f5e5a; --line:#e3e2de; --panel:#f3f2ef;
  --s1:#2a78d6; --s2:#d9541e; --s3:#4a3aa7; --good:#15803d }
@media (prefers-color-scheme: dark) { :root { --ground:#191918; --text:#efeeea; --quiet:#a3a29b;
  --line:#383835; --panel:#242422; --s1:#5b9ff0; --s2:#f08a5d; --s3:#a79df2; --good:#4ade80 } }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--text); font:17px/1.55 system-ui,sans-serif }
main { max-width:1080px; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { font-size:2rem; line-height:1.2; margin:0 0 .8rem }
h2 { font-size:1.2rem; margin:0 0 .4rem }
header p { max-width:46rem; margin:0 }
section { margin-top:2.6rem }
.note { color:var(--quiet); font-size:.88rem; font-weight:400; margin:0 0 .8rem }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr)); gap:1.5rem 2.5rem }
svg { width:100%; height:auto; display:block }
svg text { font-size:13.5px; fill:var(--quiet) }
svg .grid { stroke:var(--line) }
svg .line { fill:none; stroke-width:2; stroke-linejoin:round }
svg .chance { stroke-width:1.5; stroke-dasharray:2 5 }
.line.s1,.chance.s1 { stroke:var(--s1) } .line.s2,.chance.s2 { stroke:var(--s2) }
.line.s3,.chance.s3 { stroke:var(--s3) }
.dot { stroke:var(--ground); stroke-width:1.5 }
.dot.s1,svg text.s1 { fill:var(--s1) } .dot.s2,svg text.s2 { fill:var(--s2) }
.dot.s3,svg text.s3 { fill:var(--s3) }
svg text.name { font-weight:600 }
table { border-collapse:collapse; font-size:.94rem }
.scroll { overflow-x:auto }
.figures { width:100% }
.figures th,.figures td { text-align:left; padding:.32rem .9rem .32rem 0; border-bottom:1px solid var(--line) }
.figures thead th { color:var(--quiet); font-weight:400; font-size:.88rem }
.figures tbody th { padding-top:1.1rem }
.figures .number { text-align:right; white-space:nowrap; font-variant-numeric:tabular-nums }
.figures .bars { width:28%; padding-right:0 }
.bar { position:relative; height:10px; background:var(--panel); border-radius:3px }
.bar i { position:absolute; inset:0 auto 0 0; background:var(--s1); border-radius:3px }
.bar b { position:absolute; top:-4px; bottom:-4px; width:2px; margin-left:-1px; background:var(--text) }
.names td:first-child { white-space:nowrap }
.gallery { list-style:none; margin:0; padding:0; display:grid; gap:1.2rem 2rem;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr)) }
.gallery p { margin:0 0 .35rem }
.gallery div { display:flex; flex-wrap:wrap; gap:6px; align-items:flex-start }
img { width:72px; height:72px; border-radius:4px; border:3px solid transparent; display:block }
img.right { border-color:var(--good) }
.late { margin-left:.6rem; text-align:center } .place { color:var(--quiet); font-size:.8rem }
pre { background:var(--panel); padding:1rem; border-radius:6px; overflow-x:auto; font-size:.85rem }
@media (max-width:640px) { body { font-size:16px } h1 { font-size:1.6rem }
  .figures .bars,.figures .range { display:none } img { width:56px; height:56px } }
"""
