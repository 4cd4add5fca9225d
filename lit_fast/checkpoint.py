"""Checkpoints by Orbax, behind the few functions that are needed.

    W/checkpoints/<step>/params     the weights, which evaluation reads alone
    W/checkpoints/<step>/rest       the optimizer's state
    W/checkpoints/<step>/meta       JSON: position of the stream

Only committed steps are seen; nothing is unpickled.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lit_fast.errors import UserError

# Orbax explains every save on the root logger's INFO and warns of absent sharding files.
logging.getLogger("absl").setLevel(logging.ERROR)


def open_manager(run: Path, *, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoints of a run directory; with `keep`, older ones are deleted when a new one is saved."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager((run / "checkpoints").resolve(), options=options)


def save(manager: ocp.CheckpointManager, step: int, params: Any, rest: Any, meta: dict[str, Any]) -> None:
    """Begin to save; the arrays are copied before this returns, the writing goes on in the background."""
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        rest=ocp.args.StandardSave(rest),
        meta=ocp.args.JsonSave(meta),
    )
    manager.save(step, args=args)


def restore(manager: ocp.CheckpointManager, step: int, params: Any, rest: Any) -> tuple[Any, Any, dict]:
    """Restore everything in the shapes, types and shardings of the given trees."""
    args = ocp.args.Composite(
        params=ocp.args.StandardRestore(params),
        rest=ocp.args.StandardRestore(rest),
        meta=ocp.args.JsonRestore(),
    )
    found = _restore(manager, step, args)
    return found["params"], found["rest"], found["meta"]


def restore_params(run: Path, step: int | None, params: Any) -> tuple[int, Any]:
    """Only the weights of `step`, or of the last one: (step, tree as `params`).

    Raises:
      UserError: there is no such checkpoint.
    """
    if not (run / "checkpoints").is_dir():
        raise UserError(f"run {run} has no checkpoint yet")
    manager = open_manager(run)
    try:
        steps = sorted(manager.all_steps())
        if not steps:
            raise UserError(f"run {run} has no checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(
                f"run {run} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
            )
        step = steps[-1] if step is None else step
        args = ocp.args.Composite(params=ocp.args.StandardRestore(params))
        return step, _restore(manager, step, args)["params"]
    finally:
        manager.close()


def _restore(manager: ocp.CheckpointManager, step: int, args: Any) -> Any:
    try:
        return manager.restore(step, args=args)
    except Exception as error:  # Orbax raises bare ones too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {manager.directory}/{step} cannot be read: {reason[:200]}; delete that directory "
            "to go on from the one before"
        ) from None


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
