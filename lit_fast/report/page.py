"""HTML pages from the templates of this package: one file each, no script, nothing loaded from elsewhere.

Templates escape every value. Only the output of `fragment` is inserted unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


class Cell(NamedTuple):
    """A table cell that is more than a number.

    Attributes:
      text: its content.
      classes: CSS classes.
      title: tooltip.
      style: inline CSS.
      bar: a share from 0 to 1 and its chance level, drawn as a bar in place of the text.
    """

    text: str = ""
    classes: str = ""
    title: str = ""
    style: str = ""
    bar: tuple[float, float | None] | None = None


class Table(NamedTuple):
    """A table for the macro `table`: the first column names the rows, strings in the others are numbers.

    A row of one cell spans all columns.
    """

    header: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    classes: str = ""


def render(template: str, **values: Any) -> str:
    """Render a page from a file of `templates/`."""
    return _environment().get_template(template).render(values)


def fragment(template: str, **values: Any) -> Markup:
    """Render a part of a page from a file of `templates/`."""
    return Markup(render(template, **values))


def percent(share: float) -> str:
    """Return `12.5 %` for 0.125."""
    return f"{100 * share:.1f} %"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lit_fast.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["px"] = "{:.1f}".format
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str | Markup) -> Markup:
    """Let a text break after slashes and underscores; HTML is returned unchanged."""
    if isinstance(text, Markup):
        return text
    return Markup(re.sub("[/_](?=.)", r"\g<0><wbr>", str(escape(text))))
