"""The mesh of devices: one axis, over which the batch is dealt."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax._src.clusters import ClusterEnv
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lit_fast.errors import UserError

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over those given."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def on_each_device(function: Callable, mesh: Mesh, *dealt_arguments: bool) -> Callable:
    """`function` as one device runs it, on its part of the dealt arguments and the whole of the others.

    Its result must be the same on every device, so it has to end in a collective.
    """
    specs = tuple(PartitionSpec(AXIS) if d else PartitionSpec() for d in dealt_arguments)
    # Without check_vma gradients stay a device's own until they are summed, all at once, by hand.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def dealt(mesh: Mesh) -> NamedSharding:
    """The first axis in equal parts over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


# The processes of one job: who this one is, and how they join.
#
# A cluster is described by the environment: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
# JAX_PROCESS_ID, or whatever JAX recognises by itself (TPU pods, Slurm, Open MPI).


_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class _Cluster(NamedTuple):
    address: str | None
    processes: int
    process: int
    devices: list[int] | None  # those of this process, where several share a host


def place() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside a cluster.

    Nothing is connected and nobody is waited for, so that processes which need no collective live and
    die on their own. To be called before JAX is used.

    Raises:
      UserError: the environment describes half a cluster.
    """
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    cluster = _cluster()
    if cluster.devices is not None:  # as jax.distributed.initialize does
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, ",".join(map(str, cluster.devices)))
    return cluster.process, cluster.processes


def join() -> None:
    """Join the cluster that the environment describes, if there is one; waits for all its processes.

    To be called before JAX is used.

    Raises:
      UserError: the environment describes half a cluster, or its processes do not come together.
    """
    cluster = _cluster()
    if cluster.processes == 1 or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(cluster.address, cluster.processes, cluster.process, cluster.devices)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {cluster.process} of {cluster.processes} cannot join at {cluster.address}: {reason}; start "
            "all processes together"
        ) from None


def _cluster() -> _Cluster:
    values = [os.environ.get(name) for name in _VARIABLES]
    address, processes, process = values
    if processes is None and process is None:
        # JAX's own recognition, which jax.distributed.initialize gives no access to without connecting.
        found = ClusterEnv.auto_detect_unset_distributed_params(address, None, None, None, None, 300)
        address, count, number, devices = found
        return _Cluster(address, count or 1, number or 0, None if devices is None else list(devices))
    missing = [name for name, value in zip(_VARIABLES, values, strict=True) if value is None]
    if missing:
        raise UserError(f"the environment has some of {', '.join(_VARIABLES)} but not {missing[0]}; set it")
    assert processes is not None
    assert process is not None
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise UserError(f"JAX_PROCESS_ID {process!r} is not one of JAX_NUM_PROCESSES {processes!r} from 0 on")
    return _Cluster(address, int(processes), int(process), None)
