"""Bootstrap intervals against the binomial distribution and against drawing image by image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lit_fast.evaluation.bootstrap import bootstrap, point_estimates


def share(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The share of the images whose row is 1."""
    return {"share": weights @ rows[:, 0] / weights.sum(axis=1)}


def ratio(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The sum of the first column over that of the second: no share of images."""
    return {"ratio": weights @ rows[:, 0] / (weights @ rows[:, 1])}


def test_bootstrap_of_a_share_is_binomial_and_deterministic() -> None:
    table = (np.arange(500) < 150).astype(np.int64)[:, None]
    assert point_estimates(share, table) == {"share": 0.3}
    got = bootstrap(share, table)
    # Two percentiles of 1000 draws, each with a standard error near 0.002.
    np.testing.assert_allclose(got["share"], binom.ppf((0.025, 0.975), 500, 0.3) / 500, atol=0.01)
    assert got == bootstrap(share, table)
    assert got == bootstrap(share, table[::-1])


def test_bootstrap_of_a_ratio_equals_drawing_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    texts = rng.integers(1, 6, 300)
    table = np.stack([rng.binomial(texts, 0.4), texts], axis=1)
    picks = rng.integers(0, 300, (4000, 300))
    drawn = table[picks].sum(axis=1)
    want = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    # The ratio's standard deviation is about 0.017; of its percentiles from 4000 draws 0.0007 is the error.
    np.testing.assert_allclose(bootstrap(ratio, table, 4000)["ratio"], want, atol=0.003)
    monkeypatch.setattr("lit_fast.evaluation.bootstrap._MAX_COUNTS", 1000)  # a few resamples at a time
    np.testing.assert_allclose(bootstrap(ratio, table, 4000)["ratio"], want, atol=0.003)


def resampled(table: np.ndarray, resamples: int, cores: int) -> np.ndarray:
    """How often each distinct row counts in each resample, by so many threads."""
    seen: list[np.ndarray] = []

    def look(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(weights)
        return {"total": weights.sum(axis=1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_fast.evaluation.bootstrap.cpu_count", lambda: cores)
        bootstrap(look, table, resamples)
    return np.concatenate(seen)


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(1, 70), st.integers(2, 16))
@settings(max_examples=30, deadline=None)
def test_bootstrap_resamples_all_images_independently_of_threads(
    seed: int, images: int, resamples: int, cores: int
) -> None:
    table = np.random.default_rng(seed).integers(0, 3, (images, 2))
    got = resampled(table, resamples, cores)
    assert got.shape == (resamples, len(np.unique(table, axis=0)))
    assert (got.sum(axis=1) == images).all()
    np.testing.assert_array_equal(got, resampled(table, resamples, 1))


def test_bootstrap_threads_draw_different_resamples() -> None:
    got = resampled(np.arange(100)[:, None], 100, 2)
    assert len(np.unique(got, axis=0)) == 100  # the same seed twice would draw the same resamples again


def test_bootstrap_of_equal_rows_has_no_width_and_ignores_nan() -> None:
    assert bootstrap(share, np.ones((40, 1), np.int64)) == {"share": [1.0, 1.0]}

    def lonely(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {"own": weights[:, -1] / weights[:, -1]}

    # A third of the resamples lack the last image; they do not count.
    assert bootstrap(lonely, np.arange(5)[:, None]) == {"own": [1.0, 1.0]}
