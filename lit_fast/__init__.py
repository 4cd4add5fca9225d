"""SigLiT: train a text tower against the precomputed features of a frozen vision tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_fast.version import __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from pathlib import Path

    from lit_fast.inference.model import Model


def load(
    path: str | Path, *, step: int | None = None, average: bool = False, tower: str | None = None
) -> Model:
    """A trained model from a run or an exported folder, see `lit_fast.inference.model.load`."""
    from lit_fast.inference import model  # a light import keeps `lit-fast --help` fast

    return model.load(path, step=step, average=average, tower=tower)
