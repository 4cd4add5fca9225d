"""The frame of the pages that this package writes: one HTML file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """The page of the parts, which are HTML; `style` is added to the common one."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A heading (text), a note under it (text) and what follows (HTML)."""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells of text; the first column names the rows."""
    head = "".join(
        f'<th class="{"" if i == 0 else "number"}">{html.escape(h)}</th>' for i, h in enumerate(header)
    )
    body = []
    for name, *cells in rows:
        numbers = "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in cells)
        body.append(f"<tr><td>{html.escape(name)}</td>{numbers}</tr>")
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table class="figures">{head}<tbody>{"".join(body)}</tbody></table></div>'


def bar(value: float, chance: float | None = None) -> str:
    """A share from 0 to 1 as a bar; a tick marks the chance level."""
    tick = "" if chance is None else f'<b style="left:{100 * chance:.1f}%"></b>'
    return f'<div class="bar"><i style="width:{100 * value:.1f}%"></i>{tick}</div>'


_STYLE = """
:root { --ground:#fcfcfb; --text:#1a1a19; --quiet:#5f5e5a; --line:#e3e2de; --panel:#f3f2ef;
  --s1:#2a78d6; --s2:#d9541e; --s3:#4a3aa7; --s4:#15803d; --s5:#b8156f; --s6:#8a6d00; --s7:#0e7c86; --s8:#6b6a66;
  --good:#15803d }
@media (prefers-color-scheme: dark) { :root { --ground:#191918; --text:#efeeea; --quiet:#a3a29b;
  --line:#383835; --panel:#242422; --s1:#5b9ff0; --s2:#f08a5d; --s3:#a79df2; --s4:#4ade80; --s5:#f472b6;
  --s6:#e2c044; --s7:#4fd1dc; --s8:#b5b4ae; --good:#4ade80 } }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--text); font:17px/1.55 system-ui,sans-serif }
main { max-width:1080px; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { font-size:2rem; line-height:1.2; margin:0 0 .8rem; overflow-wrap:anywhere }
h2 { font-size:1.2rem; margin:0 0 .4rem; overflow-wrap:anywhere }
header p { max-width:46rem; margin:0 }
section { margin-top:2.6rem }
.note { color:var(--quiet); font-size:.88rem; font-weight:400; margin:0 0 .8rem }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr)); gap:1.5rem 2.5rem }
svg { width:100%; height:auto; display:block }
svg text { font-size:13.5px; fill:var(--quiet) }
svg .grid { stroke:var(--line) }
svg .line { fill:none; stroke-width:2; stroke-linejoin:round }
svg .dense { stroke-width:1.3 }
svg .chance { stroke-width:1.5; stroke-dasharray:2 5 }
svg .again { stroke-dasharray:6 4 }
.s1 { --own:var(--s1) } .s2 { --own:var(--s2) } .s3 { --own:var(--s3) } .s4 { --own:var(--s4) }
.s5 { --own:var(--s5) } .s6 { --own:var(--s6) } .s7 { --own:var(--s7) } .s8 { --own:var(--s8) }
.line,.chance { stroke:var(--own) }
.dot { stroke:var(--ground); stroke-width:1.5; fill:var(--own) }
svg text.name { font-weight:600; fill:var(--own) }
.legend { list-style:none; margin:.2rem 0 0; padding:0; display:flex; flex-wrap:wrap; gap:.1rem 1.1rem;
  font-size:.85rem; color:var(--quiet); overflow-wrap:anywhere }
.legend i { display:inline-block; width:1.1rem; margin-right:.4rem; vertical-align:middle;
  border-top:3px solid var(--own) }
.legend .again i { border-top-style:dashed }
table { border-collapse:collapse; font-size:.94rem }
.scroll { overflow-x:auto }
.figures { width:100% }
.figures th,.figures td { text-align:left; padding:.32rem .9rem .32rem 0; border-bottom:1px solid var(--line) }
.figures td:first-child { overflow-wrap:anywhere; min-width:7rem }
.figures thead th { color:var(--quiet); font-weight:400; font-size:.88rem }
.figures tbody th { padding-top:1.1rem }
.figures .number { text-align:right; white-space:nowrap; font-variant-numeric:tabular-nums }
.figures .bars { width:28%; padding-right:0 }
.bar { position:relative; height:10px; background:var(--panel); border-radius:3px }
.bar i { position:absolute; inset:0 auto 0 0; background:var(--s1); border-radius:3px }
.bar b { position:absolute; top:-4px; bottom:-4px; width:2px; margin-left:-1px; background:var(--text) }
pre { background:var(--panel); padding:1rem; border-radius:6px; overflow-x:auto; font-size:.85rem }
@media (max-width:640px) { body { font-size:16px } h1 { font-size:1.6rem } .figures .bars { display:none } }
"""
