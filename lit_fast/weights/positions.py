"""Resample positional embeddings to another resolution, by the rule of the code base that published the weights."""

from __future__ import annotations

import numpy as np
import scipy.ndimage


def resample_positions(positions: np.ndarray, grid: int, rule: str) -> np.ndarray:
    """Resample a positional embedding to another grid.

    Args:
      positions: float32 [1, old * old, width].
      grid: positions per side of the result.
      rule: "linear": corner-aligned (big_vision, vision_transformer); "bicubic": torch's
        `interpolate(mode="bicubic", align_corners=False)` (transformers: ViT, DeiT, DINOv2, CLIP, SigLIP);
        "bicubic-antialias": the same with `antialias=True` (timm; transformers: DINOv2 with registers).

    Returns:
      float32 [1, grid * grid, width].
    """
    old = round(positions.shape[1] ** 0.5)
    if old == grid:
        return positions
    width = positions.shape[-1]
    image = positions.reshape(old, old, width)
    if rule == "linear":
        image = scipy.ndimage.zoom(image, (grid / old, grid / old, 1), order=1)
    else:
        matrix = _cubic_matrix(old, grid, antialias=rule == "bicubic-antialias")
        image = np.einsum("yi,xj,ijw->yxw", matrix, matrix, image, optimize=True)
    return image.reshape(1, grid * grid, width).astype(np.float32)


def _cubic_matrix(old: int, new: int, antialias: bool) -> np.ndarray:
    """Return the interpolation matrix float64 [new, old], with half-pixel centres.

    torch uses Keys' kernel with a = -0.75 and repeats the edge; with antialias a = -0.5, stretched when
    shrinking, cut off at the edge and normalized (ATen, UpSample.h and UpSampleKernel.cpp).
    """
    centre = (np.arange(new)[:, None] + 0.5) * (old / new) - 0.5
    matrix = np.zeros((new, old))
    if antialias:
        stretch = max(old / new, 1.0)
        matrix = _keys((np.arange(old) - centre) / stretch, -0.5)
        return matrix / matrix.sum(axis=1, keepdims=True)
    for tap in range(-1, 3):
        index = np.floor(centre) + tap
        inside = index.clip(0, old - 1).astype(int)
        np.add.at(matrix, (np.arange(new)[:, None], inside), _keys(index - centre, -0.75))
    return matrix


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """Evaluate Keys' cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
