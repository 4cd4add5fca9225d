"""Resampled positional embeddings against the code whose rules they follow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_fast.weights.positions import resample_positions

GRIDS = {"old": st.integers(1, 40), "new": st.integers(1, 40)}
RULES = ["linear", "bicubic", "bicubic-antialias"]


def random_grid(side, seed=0):
    return np.random.default_rng(seed).normal(size=(1, side * side, 2)).astype(np.float32)


@settings(deadline=None)
@given(**GRIDS)
def test_resample_positions_antialiased_equals_pil(old, new):
    positions = random_grid(old)
    got = resample_positions(positions, new, "bicubic-antialias").reshape(new, new, 2)
    for channel in range(2):
        image = Image.fromarray(positions.reshape(old, old, 2)[..., channel])
        want = np.asarray(image.resize((new, new), Image.Resampling.BICUBIC))
        # float32 sums of at most 160 products of about 1.
        np.testing.assert_allclose(got[..., channel], want, rtol=0, atol=1e-5)


@settings(deadline=None)
@given(antialias=st.booleans(), **GRIDS)
def test_resample_positions_bicubic_equals_torch(antialias, old, new):
    torch = pytest.importorskip("torch")
    positions = random_grid(old)
    image = torch.tensor(positions).reshape(1, old, old, 2).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(
        image, size=(new, new), mode="bicubic", align_corners=False, antialias=antialias
    )
    got = resample_positions(positions, new, "bicubic-antialias" if antialias else "bicubic")
    want = want.permute(0, 2, 3, 1).reshape(1, new * new, 2).numpy()
    # torch computes the places in float32: up to 40 times 6e-8 off, where values change by some units.
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)


def test_resample_positions_bicubic_has_known_values():
    """torch.nn.functional.interpolate(..., mode="bicubic", align_corners=False) of torch 2.13, in float64."""
    squares = np.arange(16.0).reshape(1, 16, 1) ** 2
    want = [
        [1.681724, 5.101852, 12.697906],
        [35.605324, 54.125, 76.820602],
        [136.343739, 169.962963, 207.758113],
    ]
    np.testing.assert_allclose(resample_positions(squares, 3, "bicubic").reshape(3, 3), want, atol=1e-4)


def test_resample_positions_linear_is_corner_aligned():
    grid = np.arange(16.0).reshape(1, 16, 1)
    wide = resample_positions(grid, 7, "linear").reshape(7, 7)
    # A linear ramp stays one, the corners stay where they are.
    np.testing.assert_allclose(wide[0], np.linspace(0, 3, 7), atol=1e-6)
    np.testing.assert_allclose(wide[:, 0], np.linspace(0, 12, 7), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("new", [1, 5, 16])
def test_resample_positions_of_a_constant_keeps_it_in_float32(rule, new):
    got = resample_positions(np.full((1, 49, 3), 2.5, np.float32), new, rule)
    assert (got.shape, got.dtype) == ((1, new * new, 3), np.float32)
    np.testing.assert_allclose(got, 2.5, rtol=1e-6)


def test_resample_positions_to_the_same_grid_changes_nothing():
    positions = random_grid(7)
    for rule in RULES:
        assert resample_positions(positions, 7, rule) is positions
