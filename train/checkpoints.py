"""Save and restore the training state; only committed steps exist."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import broadcast_one_to_all

from lit_fast.config import CheckpointConfig
from lit_fast.errors import UserError, first_line, os_reason
from lit_fast.models.two_towers import Params
from lit_fast.runs.checkpoint import abstract, open_manager, restore_last, save
from lit_fast.runtime import broadcast_bits
from lit_fast.storage.paths import StrPath, join
from lit_fast.train.mirror import RunMirror
from lit_fast.train.optimizer import evaluation_params
from lit_fast.train.step import State

# TensorStore's errors name the file first and end with the reason of the operating system.
_FILE, _REASON = re.compile(r'"(/[^"]+)"'), re.compile(r": ([^:]+) \[os_error_code")


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.isfinite(optax.global_norm(params))


class Checkpoints:
    """The checkpoints of one run.

    Several processes that train in a bucket have a local directory each. There the first one reads and writes alone.
    """

    def __init__(self, workdir: StrPath, config: CheckpointConfig, mirror: RunMirror | None = None) -> None:
        """Open the checkpoints of a run directory, which with `mirror` is the local copy of one in a bucket."""
        self._workdir, self._best, self._mirror = os.fspath(workdir), config.best, mirror
        self._alone = mirror is not None and jax.process_count() > 1
        self._manager: ocp.CheckpointManager | None = None
        if not self._alone or jax.process_index() == 0:
            self._manager = open_manager(
                workdir,
                keep=config.keep,
                keep_every=config.keep_every,
                best=bool(config.best),
                alone=self._alone,
            )

    def save(self, step: int, state: State, metrics: dict[str, float]) -> None:
        """Copy the state and write it in the background, with the metrics of an evaluation."""
        trees = _to_trees(state)  # may compute, in all processes
        if (
            self._manager is None or step in self._manager.all_steps()
        ):  # it was stopped right after it had saved
            return
        if self._alone:
            trees = jax.tree.map(np.array, trees)
        with self._writing():
            save(self._manager, step, trees, {"figures": metrics}, metrics.get(self._best))

    def restore_last(self, state: State) -> tuple[int, State]:
        """Restore the last checkpoint, with the shardings of `state`.

        Returns:
          The number of completed steps and the state after them; (0, state) without a checkpoint.
        """
        trees = abstract(_to_trees(state))
        fetch = self._mirror.fetch if self._mirror else lambda step: True
        step, restored = 0, None
        if self._alone:
            shardings = jax.tree.map(lambda a: a.sharding, trees)
            trees = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), trees)
        if self._manager is not None:
            step, restored = restore_last(self._manager, trees, fetch) or (0, None)
        if self._alone:
            step = int(broadcast_one_to_all(np.int32(step)))
            if step:
                restored = jax.tree.map(broadcast_bits, trees if restored is None else restored, shardings)
        if restored is None:
            return 0, state
        trees = restored
        return step, State(
            **({"params": trees["params"], "average": trees.get("average", {})} | trees["rest"])
        )

    def check_finite(self, state: State) -> None:
        """Raise UserError if a step was not finite, or a parameter is not; such a state is never saved."""
        bad = int(state.bad_step)
        if bad < 0 and not _all_finite(state.params):  # on CPUs not part of the step
            bad = int(state.step) - 1
        if bad >= 0:
            last = None
            if self._manager is not None:
                with self._writing():
                    self._manager.wait_until_finished()
                last = self._manager.latest_step()
            raise UserError(
                f"loss, gradient or parameters became non-finite at step {bad + 1}; {self._workdir} has "
                + (f"step {last} as its last good checkpoint" if last else "no checkpoint yet")
                + "; try a lower optimizer.learning_rate in another --workdir"
            )

    def close(self) -> None:
        """Wait until everything is on the disk."""
        if self._manager is None:
            return
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # Orbax passes TensorStore's errors on
            file, found = _FILE.search(str(error)), _REASON.search(str(error))
            text = os_reason(error) if isinstance(error, OSError) else first_line(error)
            reason, action = found[1] if found else text, "fix the cause, then rerun the same command"
            if "acquire lock" in str(error):  # of one small file of each step, by Orbax
                reason = f"no file locks ({reason})"
                action = "choose a --workdir on a file system that has them"
            path = file[1] if file else getattr(error, "filename", None) or join(self._workdir, "checkpoints")
            raise UserError(f"{path} cannot be written: {reason}; {action}") from None


def _to_trees(state: State) -> dict[str, Any]:
    """Return the state in the parts that a checkpoint holds.

    "params" are the parameters to evaluate. Where the optimizer updates others, those are in "rest".
    """
    params = evaluation_params(state.opt, state.params)
    rest = {"opt": state.opt, "step": state.step, "bad_step": state.bad_step}
    if params is not state.params:
        rest["params"] = state.params
    return {"params": params, "rest": rest} | ({"average": state.average} if state.average else {})
