"""Checkpoints by Orbax, behind the few functions that are needed.

    W/checkpoints/<step>/params     the weights, which evaluation reads alone
    W/checkpoints/<step>/average    their moving average, where one is kept
    W/checkpoints/<step>/rest       the optimizer's state
    W/checkpoints/<step>/meta       JSON: digests of them, and what else the caller keeps

Only committed steps are seen; nothing is unpickled. Orbax does not notice a flipped bit in an array, so each
tree's digest is kept beside it and compared when it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from lit_fast.errors import UserError
from lit_fast.storage.files import is_directory, list_names, make_directory, rename
from lit_fast.storage.paths import StrPath, absolute, join, parent

# Orbax explains every save on the root logger's INFO, warns of absent sharding files, and prints a traceback
# of what it also raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Damaged(UserError):
    """A checkpoint that cannot be read or does not hold what was written."""


def open_manager(
    run: StrPath, *, keep: int | None = None, keep_every: int = 0, best: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints of a run directory.

    With `keep`, for the one who writes: all but the last `keep`, every `keep_every`-th step and, if `best`,
    the one saved with the highest score are deleted when a new one is there; half-written ones at once.
    """
    if keep is None:
        options = ocp.CheckpointManagerOptions(create=True)
    else:
        policies: list[Any] = [LatestN(keep)]
        if keep_every:
            policies.append(EveryNSteps(keep_every))
        if best:
            policies.append(
                BestN(get_metric_fn=lambda m: m["score"], n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), create=True, cleanup_tmp_directories=True
        )
    return ocp.CheckpointManager(absolute(join(run, "checkpoints")), options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    trees: dict[str, Any],
    meta: dict[str, Any],
    score: float | None = None,
) -> None:
    """Begin to save; the arrays are copied before this returns, the writing goes on in the background."""
    digests = {name: digest(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(
        meta=ocp.args.JsonSave(meta | {"digests": digests}),
        **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
    )
    manager.save(step, args=args, metrics=None if score is None else {"score": score})


def restore(manager: ocp.CheckpointManager, step: int, trees: dict[str, Any]) -> tuple[dict[str, Any], dict]:
    """The trees, in the shapes, types and shardings of those given, and `meta`.

    Raises:
      Damaged: they cannot be read, or are not what was written.
    """
    args = ocp.args.Composite(
        meta=ocp.args.JsonRestore(),
        **{name: ocp.args.StandardRestore(tree) for name, tree in trees.items()},
    )
    try:
        found = manager.restore(step, args=args)
    except Exception as error:  # Orbax raises bare ones too
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Damaged(f"checkpoint {manager.directory}/{step} cannot be read: {reason[:200]}") from None
    meta = found["meta"]
    written = meta.get("digests") if isinstance(meta, dict) else None
    for name in trees:
        if not isinstance(written, dict) or written.get(name) != digest(found[name]):
            raise Damaged(f"checkpoint {manager.directory}/{step} is damaged: {name} is not what was written")
    return {name: found[name] for name in trees}, meta


def restore_params(run: StrPath, step: int | None, params: Any, name: str = "params") -> tuple[int, Any]:
    """Only the weights of `step`, or of the last one, or their "average": (step, tree as `params`).

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    if not is_directory(join(run, "checkpoints")):
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
        return step, restore(manager, step, {name: params})[0][name]
    finally:
        manager.close()


def restore_last(
    manager: ocp.CheckpointManager, read: Callable[[int], Any], warn: Callable[[str], None]
) -> Any:
    """What `read` makes of the newest good step, None if there is none.

    Damaged ones are moved to W/damaged, where they are in nobody's way.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            return read(step)
        except Damaged as error:
            directory = str(manager.directory)
            away = join(parent(directory), "damaged")
            warn(f"{error}; moved to {away}, going on from the one before")
            if jax.process_index() == 0:
                make_directory(away)
                rename(join(directory, str(step)), join(away, f"{step}-{len(list_names(away))}"))
            manager.reload()
    return None


def digest(tree: Any) -> int:
    """A 32-bit sum over all bits that any single changed bit changes; equal trees have equal digests."""
    return int(_digest(tree))


@jax.jit
def _digest(tree: Any) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        width = jnp.dtype(leaf.dtype).itemsize
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
        bits = bits.astype(jnp.uint32).reshape(-1)
        # Odd factors have inverses modulo 2**32, so a change of one word is never lost.
        place = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        total += (2 * jnp.uint32(number) + 1) * jnp.sum(bits * place, dtype=jnp.uint32)
    return total


def abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
