"""Fixtures of all tests. JAX runs on four simulated CPU devices; this must be set before it is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from tests.helpers import tiny_vit_arrays

# The same examples in every run; `pytest --hypothesis-profile default` draws others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT in AugReg's file format: width 32, depth 2, 2 heads, patch 8, 32 pixels."""
    path = tmp_path_factory.mktemp("tower") / "tiny.npz"
    np.savez(path, **tiny_vit_arrays())
    return path


@pytest.fixture(scope="session")
def trained_run(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its dataset `d` beside it; see `tests.trained`."""
    from tests.trained import train_run

    return train_run(tmp_path_factory.mktemp("trained"), tiny_vit)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The directory of real photos, captions and weights; skips where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "realdata"
    path = Path(os.environ.get("LIT_FAST_REALDATA", beside))
    if not path.is_dir():
        pytest.skip("no real data here (LIT_FAST_REALDATA)")
    return path
