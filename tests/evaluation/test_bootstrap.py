"""Bootstrap intervals against the binomial distribution and against drawing image by image."""

import numpy as np
import pytest
from scipy.stats import binom

from lit_fast.evaluation.bootstrap import bootstrap, measured


def share(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The share of the images whose row is 1."""
    return {"share": weights @ rows[:, 0] / weights.sum(axis=1)}


def ratio(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The sum of the first column over that of the second: no share of images."""
    return {"ratio": weights @ rows[:, 0] / (weights @ rows[:, 1])}


def test_the_interval_of_a_share_is_binomial_and_repeatable() -> None:
    table = (np.arange(500) < 150).astype(np.int64)[:, None]
    assert measured(share, table) == {"share": 0.3}
    got = bootstrap(share, table)
    # Two percentiles of 1000 draws, each with a standard error near 0.002.
    np.testing.assert_allclose(got["share"], binom.ppf((0.025, 0.975), 500, 0.3) / 500, atol=0.01)
    assert got == bootstrap(share, table)
    assert got == bootstrap(share, table[::-1])


def test_a_ratio_as_if_every_image_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    texts = rng.integers(1, 6, 300)
    table = np.stack([rng.binomial(texts, 0.4), texts], axis=1)
    picks = rng.integers(0, 300, (4000, 300))
    drawn = table[picks].sum(axis=1)
    want = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    # The ratio's standard deviation is about 0.017; of its percentiles from 4000 draws 0.0007 is the error.
    np.testing.assert_allclose(bootstrap(ratio, table, 4000)["ratio"], want, atol=0.003)
    monkeypatch.setattr("lit_fast.evaluation.bootstrap._COUNTS", 1000)  # a few resamples at a time
    np.testing.assert_allclose(bootstrap(ratio, table, 4000)["ratio"], want, atol=0.003)


def test_what_is_alike_has_no_width_and_nothing_is_no_figure() -> None:
    assert bootstrap(share, np.ones((40, 1), np.int64)) == {"share": [1.0, 1.0]}

    def lonely(rows: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return {"own": weights[:, -1] / weights[:, -1]}

    # A third of the resamples lack the last image; they do not count.
    assert bootstrap(lonely, np.arange(5)[:, None]) == {"own": [1.0, 1.0]}
