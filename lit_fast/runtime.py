"""The device mesh with its shardings, and the processes of one job.

The mesh has one axis, over which the batch is sharded; parameters and optimizer state are replicated.

A job of several processes is described by the environment: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
JAX_PROCESS_ID, or the variables of Slurm, Open MPI or a TPU pod.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lit_fast.errors import UserError, first_line
from lit_fast.utils.output import silence

AXIS = "data"
SHARDED, REPLICATED = PartitionSpec(AXIS), PartitionSpec()


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Make a mesh of one axis over `devices`; by default over all devices of all processes."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are equal on every device."""
    return NamedSharding(mesh, REPLICATED)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is split evenly over the devices."""
    return NamedSharding(mesh, SHARDED)


def shard_map(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any = REPLICATED) -> Callable:
    """Map `function` over the devices of the mesh; each device gets its shards of the SHARDED arguments.

    Gradients inside stay local to a device until `function` sums them. REPLICATED results must end in a
    collective, as nothing checks that they are equal on every device.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# --- processes

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_METADATA_TIMEOUT = 10.0  # seconds


class _Process(NamedTuple):
    """One process of a job."""

    rank: int
    num_processes: int
    local_rank: int | None = None  # among the processes of this host, where each uses one GPU


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes of the job; (0, 1) outside a job.

    Connects to no process and waits for none, so processes that need no collective can start and stop independently.
    Call it before JAX is used: where several processes share a host, this process sees one GPU afterwards.

    Raises:
      UserError: the environment describes a job incompletely.
    """
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    process = _from_environment() or _Process(0, 1)
    if process.local_rank is not None:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, str(process.local_rank))
    return process.rank, process.num_processes


def initialize_distributed() -> None:
    """Connect the processes of the job, if there are several; all but the first become silent.

    Waits for all processes. Call it before JAX is used.

    Raises:
      UserError: the environment describes a job incompletely, or its processes cannot connect.
    """
    if jax.distributed.is_initialized():
        return
    process = _from_environment()
    if process and process.num_processes == 1:
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        if process and "JAX_PROCESS_ID" in os.environ:
            jax.distributed.initialize(address, process.num_processes, process.rank)
        else:
            jax.distributed.initialize()
    except ValueError:  # no variables, and JAX detects no job
        if process:
            raise
        return
    except RuntimeError as error:
        if process is None and "before any JAX" in str(error):
            return  # JAX is in use in this process already, and nothing describes a job
        name = f"process {process.rank} of {process.num_processes}" if process else "a process"
        raise UserError(
            f"{name} cannot connect to {address or 'the first one'}: {first_line(error)}; start all processes together"
        ) from None
    if jax.process_index() > 0:
        silence()


def _from_environment() -> _Process | None:
    """Return the process that the environment describes, None where it describes none."""
    env = os.environ
    if "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        return _from_jax_variables()
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:  # started by srun, not the batch script itself
        return _Process(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]))
    if "OMPI_COMM_WORLD_RANK" in env:
        local_rank = int(env["OMPI_COMM_WORLD_LOCAL_RANK"])
        return _Process(int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"]), local_rank)
    # JAX sets this variable on import if the host has TPU chips.
    return _from_tpu_pod() if env.get("TPU_ML_PLATFORM") == "JAX" else None


def _from_jax_variables() -> _Process:
    values = [os.environ.get(name) for name in _VARIABLES]
    for name, value in zip(_VARIABLES, values, strict=True):
        if value is None:
            raise UserError(f"the environment has some of {', '.join(_VARIABLES)} but not {name}; set it")
    _, count, rank = map(str, values)
    if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count)):
        raise UserError(
            f"JAX_PROCESS_ID {rank!r} is not below JAX_NUM_PROCESSES {count!r}; number the processes from 0"
        )
    return _Process(int(rank), int(count))


def _from_tpu_pod() -> _Process | None:
    """Return the host of a TPU pod, from the environment (GKE) or the metadata server (Cloud TPU VM)."""
    env = os.environ
    hosts, rank = env.get("TPU_WORKER_HOSTNAMES"), env.get("TPU_WORKER_ID")
    if (hosts is None or rank is None) and "TPU_SKIP_MDS_QUERY" not in env:
        hosts, rank = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if not hosts or not rank:
        return None
    count, slices = len(hosts.split(",")), int(env.get("MEGASCALE_NUM_SLICES") or 1)
    return _Process(int(env.get("MEGASCALE_SLICE_ID") or 0) * count + int(rank), count * slices)


def _metadata(key: str) -> str | None:
    """Read an attribute of this Cloud TPU VM from Google's metadata server; None if there is no server."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_TIMEOUT) as response:
            return str(response.read().decode())
    except OSError:
        return None
