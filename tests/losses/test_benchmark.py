"""The programs of `benchmarks.loss` run, and compute the same loss and gradients."""

import pytest

from benchmarks.loss import FEWER, MATRIX, OPEN_CLIP, OURS, TOLERANCE, difference, jax_case, torch_case
from tests.torch_packages import import_package


@pytest.fixture(scope="module")
def ours():
    return jax_case(OURS, 64, 1, 1)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("form", [OURS, MATRIX, FEWER])
def test_jax_forms_give_the_loss_and_gradients_of_ours(ours, form, devices):
    found = jax_case(form, 64, devices, 1)
    assert found["median"] > 0
    assert difference(found, ours) < TOLERANCE


def test_open_clip_gives_the_loss_and_gradients_of_ours(ours):
    import_package("open_clip")
    assert difference(torch_case(OPEN_CLIP, 64, 1, None), ours) < TOLERANCE
