"""Save and restore checkpoints with Orbax.

    W/checkpoints/<step>/params     the weights; evaluation reads them alone
    W/checkpoints/<step>/average    their moving average, if one is kept
    W/checkpoints/<step>/rest       the optimizer's state
    W/checkpoints/<step>/meta       JSON: digests of these trees, and other values of the caller

Only committed steps are visible; nothing is unpickled. Orbax does not detect a flipped bit in an array, so the
digest of each tree is stored beside it and compared when it is read.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from lit_fast.errors import UserError, first_line
from lit_fast.runs.remote_checkpoints import cached_checkpoint
from lit_fast.storage.files import is_directory, list_names, local_path, make_directory, rename
from lit_fast.storage.paths import StrPath, absolute, is_bucket, join, parent
from lit_fast.utils.output import status

# Orbax logs every save at INFO of the root logger, warns of absent sharding files, and prints tracebacks of
# exceptions that it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read or whose content differs from what was saved."""


def open_manager(
    run: StrPath, *, keep: int | None = None, keep_every: int = 0, best: bool = False, alone: bool = False
) -> ocp.CheckpointManager:
    """Open the checkpoints of a run directory, for reading or, with `keep`, for writing.

    Args:
      run: the run directory.
      keep: number of latest checkpoints to keep; others are deleted after a new one is committed, incomplete ones at
        once. None: for reading; nothing is deleted.
      keep_every: keep every step that is a multiple of this as well; 0: none.
      best: keep the checkpoint with the highest score as well.
      alone: only the first process of the job uses the manager, with trees of numpy arrays; no other one sees the
        directory.
    """
    _silence_repeated_errors()
    if keep is None:
        options = ocp.CheckpointManagerOptions(create=True)
    else:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # has the abandoned writes
        multiprocessing = ocp.options.MultiprocessingOptions()
        if alone:
            multiprocessing = ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
            )
        policies: list[Any] = [LatestN(keep)]
        if keep_every:
            policies.append(EveryNSteps(keep_every))
        if best:
            policies.append(
                BestN(get_metric_fn=lambda m: m["score"], n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            create=not alone,  # it would wait for the other processes
            cleanup_tmp_directories=True,
            multiprocessing_options=multiprocessing,
        )
    if alone:
        make_directory(join(run, "checkpoints"))
    return ocp.CheckpointManager(local_path(absolute(join(run, "checkpoints"))), options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    trees: dict[str, Any],
    meta: dict[str, Any],
    score: float | None = None,
) -> None:
    """Copy the arrays, then save them in the background."""
    digests = {name: digest(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(
        meta=ocp.args.JsonSave(meta | {"digests": digests}),
        **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
    )
    manager.save(step, args=args, metrics=None if score is None else {"score": score})


def restore(
    manager: ocp.CheckpointManager, step: int, abstract_trees: dict[str, Any]
) -> tuple[dict[str, Any], dict]:
    """Return trees with the shapes, dtypes and shardings of `abstract_trees`, and `meta`.

    Raises:
      DamagedCheckpointError: a tree cannot be read or its digest differs from the saved one.
    """
    args = ocp.args.Composite(
        meta=ocp.args.JsonRestore(),
        **{name: ocp.args.StandardRestore(tree) for name, tree in abstract_trees.items()},
    )
    location = f"{manager.directory}/{step}"
    try:
        restored = manager.restore(step, args=args)
    except Exception as error:  # Orbax raises Exception itself too
        raise DamagedCheckpointError(
            f"checkpoint {location} cannot be read: {first_line(error)}; give another --step"
        ) from None
    meta = restored["meta"]
    digests = meta.get("digests") if isinstance(meta, dict) else None
    for name in abstract_trees:
        if not isinstance(digests, dict) or digests.get(name) != digest(restored[name]):
            raise DamagedCheckpointError(
                f"checkpoint {location} is damaged: {name} differs from what was saved; give another --step"
            )
    return {name: restored[name] for name in abstract_trees}, meta


def restore_params(
    run: StrPath, step: int | None, abstract_params: Any, name: str = "params"
) -> tuple[int, Any]:
    """Restore only the weights, or with `name` "average" their moving average.

    Returns:
      The step, by default the last one, and a tree like `abstract_params`.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    if is_bucket(run):
        step, run = cached_checkpoint(os.fspath(run), step, (name, "meta"))
    if not is_directory(join(run, "checkpoints")):
        raise UserError(f"run {run} has no checkpoint yet; wait until lit-fast train has saved one")
    manager = open_manager(run)
    try:
        steps = sorted(manager.all_steps())
        if not steps:
            raise UserError(f"run {run} has no checkpoint yet; wait until lit-fast train has saved one")
        if step is not None and step not in steps:
            raise UserError(
                f"run {run} has no checkpoint of step {step}; choose from {', '.join(map(str, steps))}"
            )
        step = steps[-1] if step is None else step
        return step, restore(manager, step, {name: abstract_params})[0][name]
    finally:
        manager.close()


def restore_last(
    manager: ocp.CheckpointManager,
    abstract_trees: dict[str, Any],
    fetch: Callable[[int], bool] = lambda step: True,
) -> tuple[int, dict[str, Any]] | None:
    """Return the newest step that is not damaged and its trees; None if there is none.

    Damaged checkpoints are moved to W/damaged.

    Args:
      fetch: makes the files of a step complete; returns False if they are damaged.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            if not fetch(step):
                raise DamagedCheckpointError(
                    f"checkpoint {manager.directory}/{step} is damaged; give another --step"
                )
            return step, restore(manager, step, abstract_trees)[0]
        except DamagedCheckpointError as error:
            directory = str(manager.directory)
            damaged = join(parent(directory), "damaged")
            status(f"warning: {error.problem}; moved to {damaged}, continuing from the previous checkpoint")
            if jax.process_index() == 0:
                make_directory(damaged)
                rename(join(directory, str(step)), join(damaged, f"{step}-{len(list_names(damaged))}"))
            manager.reload()
    return None


def _silence_repeated_errors() -> None:
    """Silence the reads and writes that Orbax abandons after the first failed one, which raises."""
    previous = sys.unraisablehook
    if getattr(previous, "__module__", "") == __name__:  # is ours
        return
    warnings.filterwarnings("ignore", "coroutine '_read_.*' was never awaited", RuntimeWarning)

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        orbax = code is not None and "orbax" in code.co_filename
        if not orbax and str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook


def digest(tree: Any) -> int:
    """Return a 32-bit sum over all bits of a tree of arrays; any single changed bit changes it."""
    return int(_digest(tree))


@jax.jit
def _digest(tree: Any) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        width = jnp.dtype(leaf.dtype).itemsize
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
        bits = bits.astype(jnp.uint32).reshape(-1)
        # Odd factors have inverses modulo 2**32, so a change of one word is never lost.
        factors = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        total += (2 * jnp.uint32(number) + 1) * jnp.sum(bits * factors, dtype=jnp.uint32)
    return total


def abstract(tree: Any) -> Any:
    """Return the shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
