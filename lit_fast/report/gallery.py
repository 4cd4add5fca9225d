"""Pictures on a page: small copies of image files, in strips with a line of text under each."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

from lit_fast.data.images.decode import ImageError, decode

SIDE = 128  # pixels of a thumbnail's long side
MOST_BYTES = 8192  # of a thumbnail as a file; a third more in the page
_QUALITIES = (80, 60, 40, 20, 5)


class Picture(NamedTuple):
    """A picture of a strip."""

    source: str | None  # of `thumbnail`; None: a box says that the picture could not be had
    text: str = ""
    kind: str = ""  # "right" or "wrong" frame it in green or red


def thumbnail(data: bytes | None) -> str | None:
    """An image file as a `data:` URI of a small JPEG; None if there is none or it cannot be decoded.

    The file is decoded by `lit_fast.data.images.decode`, with its limits, and encoded again: nothing of it but
    pixels gets into the page. Transparency is laid on white.
    """
    if data is None:
        return None
    try:
        image = decode(data, at_least=2 * SIDE, alpha="white")
    except ImageError:
        return None
    image.info.clear()  # PIL would copy a comment
    image.thumbnail((SIDE, SIDE))
    for quality in _QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() <= MOST_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def strip(pictures: Sequence[Picture]) -> str:
    """Pictures in a row that wraps, as HTML; `STYLE` has to be in the page."""
    figures = []
    for picture in pictures:
        text = html.escape(picture.text, quote=True)
        if picture.source is None:
            shown = '<span class="absent">no picture</span>'
        else:
            shown = f'<img src="{html.escape(picture.source, quote=True)}" alt="{text}">'
        caption = f"<figcaption>{text}</figcaption>" if text else ""
        figures.append(f'<figure class="{html.escape(picture.kind, quote=True)}">{shown}{caption}</figure>')
    return f'<div class="strip">{"".join(figures)}</div>'


def cards(entries: Sequence[tuple[str, str]]) -> str:
    """A list of headings (text) with what belongs to each (HTML, such as a strip) under it."""
    if not entries:
        return '<p class="note">There is none.</p>'
    items = "".join(f"<li><p>{html.escape(heading)}</p>{body}</li>" for heading, body in entries)
    return f'<ul class="cards">{items}</ul>'


STYLE = f"""
:root {{ --bad:#c2261c }}
@media (prefers-color-scheme: dark) {{ :root {{ --bad:#f87171 }} }}
.cards {{ list-style:none; margin:0; padding:0; display:grid; gap:1.6rem 2rem }}
.cards p {{ margin:0 0 .4rem; overflow-wrap:anywhere }}
.strip {{ display:flex; flex-wrap:wrap; gap:.7rem .6rem; align-items:flex-start }}
figure {{ margin:0; width:{SIDE + 6}px }}
figure img,.absent {{ border:3px solid transparent; border-radius:5px; display:block; max-width:100% }}
.absent {{ width:{SIDE + 6}px; height:96px; line-height:90px; text-align:center; font-size:.8rem;
  color:var(--quiet); background:var(--panel) }}
.right img,.right .absent {{ border-color:var(--good) }}
.wrong img,.wrong .absent {{ border-color:var(--bad) }}
figcaption {{ font-size:.8rem; line-height:1.35; color:var(--quiet); margin-top:.2rem; overflow-wrap:anywhere;
  white-space:pre-line }}
@media (max-width:480px) {{ figure {{ width:calc((100% - 1.2rem) / 3) }} .absent {{ width:100% }} }}
"""
