"""The table of public vision towers, `known_towers.toml`, and its printed form."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from lit_fast.models.architecture import Architecture, flops_per_image, parameters
from lit_fast.models.sizes import VARIANTS, Shape
from lit_fast.utils.format import format_table


@dataclass(frozen=True)
class KnownTower:
    """A public tower, as far as it is known before it is downloaded.

    Attributes:
      name: the value of `--tower`.
      family: the models it belongs to.
      licence: that of the weights.
      source: bucket and path at Google Cloud Storage, or the repository of the Hugging Face Hub.
      resolution: height and width of its images, pixels.
      architecture: from which the table's figures are computed.
      sha256: digest of the weights, "" if unknown.
    """

    name: str
    family: str
    licence: str
    source: str
    resolution: int
    architecture: Architecture
    sha256: str = ""

    @property
    def address(self) -> str:
        """Return `source` with its host."""
        return f"{'hf.co/' if self.name.startswith(('hf:', 'timm:')) else 'gs://'}{self.source}"


@cache
def known_towers() -> tuple[KnownTower, ...]:
    """Return all towers, in the order of the file."""
    file = resources.files("lit_fast.weights").joinpath("known_towers.toml")
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    return tuple(_tower(family | row) for family in table["family"] for row in family["towers"])


def _tower(row: dict[str, Any]) -> KnownTower:
    name = row["name"]
    shape = Shape(*row["shape"]) if "shape" in row else VARIANTS[row["variant"]]
    options = {f.name: row[f.name] for f in fields(Architecture) if f.name in row}
    return KnownTower(
        name=name,
        family=row["family"],
        licence=row["licence"],
        source=row.get("source") or name.removeprefix("hf:").replace("timm:", "timm/"),
        resolution=row["resolution"],
        architecture=Architecture(**options | {"shape": shape}),
        sha256=row.get("sha256", ""),
    )


class TowerRow(NamedTuple):
    """A line of the table; parameters are without head, GFLOPs count two operations per multiply-add."""

    name: str
    width: str
    pixels: str
    pooling: str
    parameters: str
    gflops: str
    licence: str
    source: str


def known_rows(towers: Sequence[KnownTower]) -> list[TowerRow]:
    """Return the lines of known towers."""
    return [
        TowerRow(
            t.name,
            str(t.architecture.width),
            str(t.resolution),
            t.architecture.pool,
            f"{parameters(t.architecture, t.resolution) / 1e6:.1f} M",
            f"{flops_per_image(t.architecture, t.resolution) / 1e9:.1f}",
            t.licence,
            t.address,
        )
        for t in towers
    ]


def format_towers(towers: Sequence[TowerRow]) -> str:
    """Format a table with a line per tower."""
    head = ("name", "width", "pixels", "pooling", "parameters", "GFLOPs", "licence", "source")
    rows = [head, *towers]
    left = [i for i, title in enumerate(head) if title in ("name", "pooling", "licence", "source")]
    return format_table(rows, left)
