"""Save and restore the training state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_fast.config import CheckpointConfig
from lit_fast.errors import UserError
from lit_fast.runs.checkpoint import abstract, open_manager, restore, restore_last, save
from lit_fast.train.step import State
from lit_fast.train.tracking.console import _say


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self._run, self._best = run, config.best
        self._manager = open_manager(
            run, keep=config.keep, keep_every=config.keep_every, best=bool(config.best)
        )

    def save(self, number: int, state: State, figures: dict[str, float]) -> None:
        """Begin to save; the writing goes on in the background. `figures` are an evaluation's, if any."""
        if number in self._manager.all_steps():  # a run that was stopped right after it had saved
            return
        with self._disk():
            save(self._manager, number, _trees(state), {"figures": figures}, figures.get(self._best))

    def restore_last(self, state: State) -> tuple[int, State]:
        """The number of completed steps and the state after them, in the layout of `state`."""

        def read(number: int) -> tuple[int, State]:
            trees, _ = restore(self._manager, number, abstract(_trees(state)))
            return number, State(trees["params"], average=trees.get("average", {}), **trees["rest"])

        warn = lambda line: _say(f"warning: {line}")  # noqa: E731
        return restore_last(self._manager, read, warn) or (0, state)

    def check(self, state: State) -> None:
        """Raises UserError if a step was not finite; such a state is never saved."""
        bad = int(state.bad_step)
        if bad >= 0:
            with self._disk():
                self._manager.wait_until_finished()
            last = self._manager.latest_step()
            raise UserError(
                f"loss or gradient became non-finite at step {bad + 1}; {self._run} has "
                + (f"step {last} as its last good checkpoint" if last else "no checkpoint yet")
                + "; try a lower optimizer.learning_rate in another --workdir"
            )

    def close(self) -> None:
        """Wait until everything is on the disk."""
        with self._disk():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # Orbax passes on what TensorStore says
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"{self._manager.directory} cannot be written: {reason}; mend that and run the same command again"
            ) from None


def _trees(state: State) -> dict[str, Any]:
    """The state as a checkpoint holds it."""
    rest = {"opt": state.opt, "step": state.step, "bad_step": state.bad_step}
    return {"params": state.params, "rest": rest} | ({"average": state.average} if state.average else {})
