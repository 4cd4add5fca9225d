"""How the figures of a run are drawn: headings, axes and order."""

from __future__ import annotations

import html
from collections.abc import Sequence

from lit_fast.charts import Series, chart

# In the order in which they are shown; what is not here has its own name for a heading and comes last.
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "temperature": "Temperature",
    "bias": "Bias",
    "grad_norm": "Norm of the gradients",
    "update_norm": "Norm of the updates",
    "param_norm": "Norm of the parameters",
    "pairs_per_second": "Pairs per second",
    "data_wait_share": "Share of the time that waits for data",
    "mfu": "MFU: share of the chips' peak",
}
_SHARES = ("data_wait_share", "mfu")
# They move little about a value of their own, which is not zero.
_FAR_FROM_ZERO = ("temperature", "bias", "param_norm")


def title(name: str) -> str:
    """The heading of a figure's chart."""
    return TITLES.get(name, name if "/" in name else name.replace("_", " ").capitalize())


def panel(heading: str, name: str, series: Sequence[Series], *, hours: bool = False) -> str:
    """A chart of the figure `name`, of one run or of several, under a heading (text)."""
    share = "/" in name or name in _SHARES  # figures of evaluations have a slash
    unit = "hours" if hours else "steps"
    drawn = chart(series, percent=share, unit=unit, zero=name not in _FAR_FROM_ZERO)
    return f"<div><h2>{html.escape(heading)}</h2>{drawn}</div>"
