"""The device mesh with its shardings, and the processes of one job.

The mesh has one axis, over which the batch is sharded; parameters and optimizer state are replicated.

A job of several processes is described by the environment: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
JAX_PROCESS_ID, or the variables of Slurm, Open MPI or a TPU pod.
"""

from __future__ import annotations

import atexit
import os
import re
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lit_fast.errors import MachineError, UserError, first_line
from lit_fast.utils.output import silence
from lit_fast.utils.rendezvous import Rendezvous

AXIS = "data"
SHARDED, REPLICATED = PartitionSpec(AXIS), PartitionSpec()


def start_devices() -> list[jax.Device]:
    """Start JAX and return the devices of this process.

    Raises:
      UserError: JAX_PLATFORMS names a device that cannot be used here, or none can.
    """
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError, ValueError) as error:  # AssertionError: "cuda" without its package
        names = os.environ.get("JAX_PLATFORMS", "")
        cause = f"the device of JAX_PLATFORMS={names}" if names else "the device"
        package = "install the package for it, pip install 'jax[cuda13]' or 'jax[tpu]', or " if names else ""
        reason = (
            first_line(error).partition(" (set JAX_PLATFORMS=")[0] if str(error) else "it is not installed"
        )
        raise UserError(f"{cause} cannot be used: {reason}; {package}set JAX_PLATFORMS=cpu") from None


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Make a mesh of one axis over `devices`; by default over all devices of all processes."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


def platform_of(mesh: Mesh) -> str:
    """Return "cpu", "tpu" or "gpu"."""
    platform = mesh.devices.flat[0].platform
    return platform if platform in ("cpu", "tpu") else "gpu"


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
_TIMEOUT_VARIABLE = "LIT_FAST_CLUSTER_TIMEOUT"
_TIMEOUT = 50.0  # seconds to wait for all processes of a job
_METADATA_TIMEOUT = 10.0  # seconds


class _Process(NamedTuple):
    """One process of a job."""

    rank: int
    num_processes: int
    local_rank: int | None = None  # among the processes of this host, where each uses one GPU
    host: str = ""  # of process 0; "": not known
    port: int = 0  # that JAX chooses for the job
    variables: tuple[str, ...] = ()  # of the environment, from which the above is


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
    if process.local_rank is not None and process.num_processes > 1:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, str(process.local_rank))
    return process.rank, process.num_processes


@contextmanager
def distributed_job() -> Iterator[None]:
    """Run the block in the processes of the job, if there are several; all but the first become silent.

    Waits for all processes, at most LIT_FAST_CLUSTER_TIMEOUT seconds (default 50). A process that dies in the block
    ends the others, with a line. Call it before JAX is used.

    Raises:
      UserError: the environment describes a job incompletely.
      MachineError: not all processes came, or one failed.
    """
    rendezvous = _initialize_distributed()
    if rendezvous is None:
        yield
        return
    try:
        yield
    except UserError as error:
        _fail(rendezvous, error.exit_status)
        raise
    except Exception as error:
        rendezvous.wait_for_loss()
        _fail(rendezvous, MachineError.exit_status)
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(
            error
        ):  # a collective operation failed
            raise MachineError(
                f"process {jax.process_index()} of {jax.process_count()} lost the others: {first_line(error)}; rerun "
                "the same command in all processes"
            ) from None
        raise
    except BaseException:  # a signal, after which all processes stop
        rendezvous.close()
        raise
    rendezvous.close()


def smallest_of_processes(memory: int) -> int:
    """Return the smallest of the bytes that the processes of the job give, in MiB steps."""
    return int(process_allgather(np.int32(memory >> 20)).min()) << 20  # JAX has no 64-bit integers by default


def all_agree(holds: bool) -> bool:
    """Return whether something holds in all processes of the job."""
    return bool(process_allgather(np.int32(holds)).min())


def broadcast_text(text: str, size: int = 1024) -> str:
    """Return the first process's text in all processes, cut at `size` bytes of UTF-8, without spaces at the end."""
    message = np.frombuffer(text.encode()[:size].ljust(size), np.uint8)
    message = np.asarray(broadcast_one_to_all(message)).astype(np.uint8)
    return message.tobytes().decode(errors="replace").rstrip()


def broadcast_bits(array: Any, sharding: NamedSharding) -> jax.Array:
    """Return the first process's array in all processes, every bit of it, replicated over the devices.

    Args:
      array: equal in shape and dtype in all processes; the content of the others does not matter.
    """
    array = np.asarray(array)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize]
    # Processes add 32-bit numbers on every backend; a sum of floats would lose the sign of zero.
    words = np.asarray(broadcast_one_to_all(np.ascontiguousarray(array).view(unsigned).astype(np.uint32)))
    result = words.astype(unsigned).view(array.dtype).reshape(array.shape)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: result[index])


def _fail(rendezvous: Rendezvous, status: int) -> None:
    """End this process without JAX's shutdown, which waits for processes that may wait for this one."""
    rendezvous.abandon()
    atexit.register(os._exit, status)


def _initialize_distributed() -> Rendezvous | None:
    if jax.distributed.is_initialized():
        return None
    process = _from_environment()
    if process is None:
        try:
            with warnings.catch_warnings():  # in any Kubernetes pod: its client is not installed
                warnings.simplefilter("ignore")
                jax.distributed.initialize()  # JAX may know more kinds of jobs
        except (
            ValueError,
            RuntimeError,
        ):  # nothing describes a job, or JAX is in use in this process already
            return None
        if jax.process_index() > 0:
            silence()
        return None
    if process.num_processes == 1:
        return None
    if process.rank > 0:
        silence()
    rendezvous = _meet(process)
    if process.local_rank is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        local, method = None, None
    else:
        local, method = [process.local_rank], "deactivate"
    try:
        jax.distributed.initialize(
            coordinator_address(),
            process.num_processes,
            process.rank,
            local_device_ids=local,
            cluster_detection_method=method,
        )
    except (ValueError, RuntimeError) as error:
        _fail(rendezvous, MachineError.exit_status)
        raise MachineError(
            f"process {process.rank} of {process.num_processes} cannot connect to {coordinator_address()}: "
            f"{first_line(error)}; rerun the same command in all processes"
        ) from None
    return rendezvous


def _meet(process: _Process) -> Rendezvous:
    """Wait for all processes of the job."""
    text = os.environ.get(_TIMEOUT_VARIABLE) or str(_TIMEOUT)
    try:
        timeout = float(text)
    except ValueError:
        raise UserError(f"{_TIMEOUT_VARIABLE} {text!r} is not a number; give seconds") from None
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    try:
        return Rendezvous(process.rank, process.num_processes, coordinator_address(), bind, timeout)
    except MachineError as error:
        variables = ", ".join(f"{n}={os.environ[n]}" for n in process.variables if n in os.environ)
        raise MachineError(
            f"{error}; start all processes together, or set {_TIMEOUT_VARIABLE} to more seconds; "
            f"the job is described by {variables or 'the TPU metadata server'}"
        ) from None


def coordinator_address() -> str:
    """Return HOST:PORT of process 0 of the job that the environment describes, as JAX chooses it.

    Raises:
      UserError: the environment does not say it.
    """
    process = _from_environment() or _Process(0, 1)
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
            raise UserError(f"JAX_COORDINATOR_ADDRESS {address!r} is not HOST:PORT; give both")
        return address
    if not process.host:
        raise UserError(
            f"the environment ({', '.join(process.variables)}) does not say where process 0 runs; set "
            "JAX_COORDINATOR_ADDRESS to HOST:PORT of it"
        )
    return f"{process.host}:{os.environ.get('JAX_COORDINATOR_PORT') or process.port}"


def _from_environment() -> _Process | None:
    """Return the process that the environment describes, None where it describes none."""
    env = os.environ
    if "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        return _from_jax_variables()
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:  # started by srun, not the batch script itself
        return _from_slurm()
    if "OMPI_COMM_WORLD_RANK" in env:
        return _from_open_mpi()
    # JAX sets this variable on import if the host has TPU chips.
    return _from_tpu_pod() if env.get("TPU_ML_PLATFORM") == "JAX" else None


def _from_jax_variables() -> _Process:
    values = [os.environ.get(name) for name in _VARIABLES]
    for name, value in zip(_VARIABLES, values, strict=True):
        if value is None:
            raise UserError(f"the environment has some of {', '.join(_VARIABLES)} but not {name}; set it")
    _, count, rank = map(str, values)
    _check_rank("JAX_PROCESS_ID", rank, "JAX_NUM_PROCESSES", count)
    return _Process(int(rank), int(count), variables=_VARIABLES)


def _check_rank(rank_name: str, rank: str, count_name: str, count: str) -> None:
    if not (count.isdecimal() and rank.isdecimal() and int(rank) < int(count)):
        raise UserError(
            f"{rank_name} {rank!r} is not below {count_name} {count!r}; number the processes from 0"
        )


def _from_slurm() -> _Process:
    # SLURM_NTASKS is the job's; the step of an interactive shell has one task.
    total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    count, rank, local_rank = _job_numbers(total, "SLURM_PROCID", "SLURM_LOCALID")
    nodes, job = os.environ["SLURM_STEP_NODELIST"], os.environ.get("SLURM_JOB_ID", "")
    prefix, _, rest = nodes.partition(",")[0].partition(
        "["
    )  # node001, node[001-015],other, node[001,007],other
    host = prefix + re.split(r"[-,\]]", rest)[0]
    variables = (total, "SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "JAX_COORDINATOR_ADDRESS")
    return _Process(rank, count, local_rank, host if job.isdecimal() else "", _job_port(job), variables)


def _from_open_mpi() -> _Process:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    count, rank, local_rank = _job_numbers(*names)
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or 1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370
    uri = re.match(
        r"(\d+)\..*?;tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)",
        os.environ.get("OMPI_MCA_orte_hnp_uri", ""),  # noqa: SIM112
    )
    job, host = uri.groups() if uri else ("", "")
    host = f"[{host}]" if ":" in host else host
    port = _job_port(str(int(job) >> 12)) if job else 0
    return _Process(
        rank, count, local_rank, host, port, (*names[:2], "OMPI_MCA_orte_hnp_uri", "JAX_COORDINATOR_ADDRESS")
    )


def _job_port(job: str) -> int:
    """Return the port that JAX chooses for a job number: one of the last 4096."""
    return 65536 - 4096 + int(job) % 4096 if job.isdecimal() else 0


def _job_numbers(*names: str) -> list[int]:
    """Return the variables of the number of processes, the rank and the local rank as integers."""
    values = [os.environ.get(name, "") for name in names]
    for name, value in zip(names, values, strict=True):
        if not value.isdecimal():
            raise UserError(
                f"the environment has {name} {value!r} instead of a number; set it, or unset the others"
            )
    _check_rank(names[1], values[1], names[0], values[0])
    return [int(value) for value in values]


def _from_tpu_pod() -> _Process | None:
    """Return the host of a TPU pod, from the environment (GKE) or the metadata server (Cloud TPU VM)."""
    env = os.environ
    hosts, rank = env.get("TPU_WORKER_HOSTNAMES"), env.get("TPU_WORKER_ID")
    if (hosts is None or rank is None) and "TPU_SKIP_MDS_QUERY" not in env:
        hosts, rank = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if not hosts or not rank:
        return None
    names, slices = hosts.split(","), int(env.get("MEGASCALE_NUM_SLICES") or 1)
    first = names[0].split(":")  # a name, or name:number:address
    host = env.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or first[2 if len(first) == 3 else 0]
    rank_of_slice = int(env.get("MEGASCALE_SLICE_ID") or 0) * len(names)
    variables = (
        "TPU_WORKER_HOSTNAMES",
        "TPU_WORKER_ID",
        "MEGASCALE_COORDINATOR_ADDRESS",
        "MEGASCALE_NUM_SLICES",
    )
    return _Process(rank_of_slice + int(rank), len(names) * slices, None, host, 8482, variables)


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
