"""What is never saved; tests/e2e/test_resume.py saves and restores."""

import jax.numpy as jnp
import pytest

from lit_fast.config import CheckpointConfig
from lit_fast.errors import UserError
from lit_fast.train.checkpoints import Checkpoints
from lit_fast.train.step import State


@pytest.mark.parametrize(
    ("value", "bad_step", "message"),
    [
        (1.0, -1, ""),
        (float("nan"), -1, "parameters became non-finite at step 7;"),
        (float("inf"), -1, "parameters became non-finite at step 7;"),
        (1.0, 4, "parameters became non-finite at step 5;"),
    ],
)
def test_check_finite_finds_bad_steps_and_parameters(tmp_path, value, bad_step, message):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state = State({"txt": jnp.array([0.0, value])}, (), jnp.int32(7), jnp.int32(bad_step), {})
    try:
        if message:
            with pytest.raises(UserError, match=message):
                checkpoints.check_finite(state)
        else:
            checkpoints.check_finite(state)
    finally:
        checkpoints.close()
