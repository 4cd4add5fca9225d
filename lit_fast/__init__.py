"""SigLiT: train a text tower against the precomputed features of a frozen vision tower.

`lit_fast.embed` and `lit_fast.train`, the two stages, are the folders `embed/` and `train/` of the repository.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_fast.version import __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from lit_fast.inference.model import Model
    from lit_fast.storage.paths import StrPath


def load(path: StrPath, *, step: int | None = None, average: bool = False, tower: str | None = None) -> Model:
    """Load a trained model from the directory of a run or of an export, see `lit_fast.inference.load.load`."""
    # Imported late, so that `lit-fast --help` does not import JAX.
    from lit_fast.inference import load as loading

    return loading.load(path, step=step, average=average, tower=tower)
