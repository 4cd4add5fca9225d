"""Processes of a job, from real environments and real processes."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lit_fast.runtime import coordinator_address
from tests.embed.test_processes import environment, free_port

IMPORTS = "from lit_fast.runtime import distributed_job, process_rank; import jax\n"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
POD = {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", IMPORTS + code]
    return subprocess.run(command, env=inherited | variables, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("variables", "rank", "visible"),
    [
        ({}, "(0, 1)", "all"),
        (
            {"JAX_COORDINATOR_ADDRESS": "x:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            "(2, 3)",
            "all",
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "node[01-02]"}, "(3, 4)", "1"),
        (SLURM, "(0, 1)", "all"),  # the batch script itself, not a task of srun
        (OPEN_MPI, "(5, 6)", "2"),
        (POD, "(1, 4)", "all"),
        (POD | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, "(5, 8)", "all"),
    ],
    ids=["none", "jax", "srun", "sbatch", "open mpi", "tpu pod", "two slices"],
)
def test_process_rank_is_read_from_the_environment(variables, rank, visible):
    code = "print(process_rank(), jax.config.values['jax_cuda_visible_devices'])"
    assert run(code, **variables).stdout == f"{rank} {visible}\n"


@contextmanager
def metadata_server(**attributes: str) -> Iterator[str]:
    """A server that answers like that of a Cloud TPU VM; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = attributes[self.path.rpartition("/")[2]].encode()
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_process_rank_of_a_cloud_tpu_vm_is_read_from_the_metadata_server():
    attributes = {"worker-network-endpoints": "n:0:10.0.0.1,n:1:10.0.0.2", "agent-worker-number": "1"}
    with metadata_server(**attributes) as address:
        # JAX forbids the query where it finds no TPU.
        code = "import os; del os.environ['TPU_SKIP_MDS_QUERY']; print(process_rank())"
        got = run(code, TPU_ML_PLATFORM="JAX", GCE_METADATA_IP=address)
    assert got.stdout == "(1, 2)\n", got.stderr


@pytest.mark.parametrize("call", ["process_rank()", "distributed_job().__enter__()"])
def test_incomplete_environment_is_refused(call):
    half = run(call, JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="1")
    assert "but not JAX_COORDINATOR_ADDRESS; set it" in half.stderr
    wrong = run(call, JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="4", JAX_COORDINATOR_ADDRESS="x:1")
    assert "JAX_PROCESS_ID '4' is not below JAX_NUM_PROCESSES '4'" in wrong.stderr
    wrong = run(call, SLURM_STEP_NODELIST="x", SLURM_PROCID="5", SLURM_NTASKS="2", SLURM_LOCALID="0")
    assert "SLURM_PROCID '5' is not below SLURM_NTASKS '2'" in wrong.stderr


def test_distributed_job_alone_does_nothing():
    assert run("with distributed_job(): print(jax.process_count())").stdout == "1\n"


def test_distributed_job_connects_all_processes_and_silences_all_but_the_first():
    code = (
        IMPORTS + "from lit_fast.utils.output import result\n"
        "from jax.experimental.multihost_utils import process_allgather\n"
        "with distributed_job(), distributed_job():\n"
        "  result('only the first')\n"
        "  total = process_allgather(jax.numpy.ones(1) * (1 + process_rank()[0])).sum()\n"
        "  print(process_rank(), jax.device_count(), int(total))"
    )
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment(i, 2, port), stdout=subprocess.PIPE)
        for i in range(2)
    ]
    first, second = (p.communicate(timeout=100)[0] for p in processes)
    assert b"only the first" in first
    assert b"only the first" not in second
    assert [out.splitlines()[-1] for out in (first, second)] == [b"(0, 2) 2 3", b"(1, 2) 2 3"]


def test_process_that_dies_ends_the_others_with_a_line():
    code = (
        IMPORTS + "import os, sys; from lit_fast.errors import UserError\n"
        "from jax.experimental.multihost_utils import process_allgather\n"
        "try:\n"
        "  with distributed_job():\n"
        "    if process_rank()[0] == 1: os.kill(os.getpid(), 9)\n"
        "    while True: process_allgather(jax.numpy.ones(1))\n"
        "except UserError as error:\n"
        "  print(error, file=sys.stderr); sys.exit(error.exit_status)"
    )
    port = free_port()
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment(i, 2, port), stderr=subprocess.PIPE)
        for i in range(2)
    ]
    errors = processes[0].communicate(timeout=100)[1].decode()
    processes[1].communicate()
    assert processes[0].returncode == 1, errors
    assert "process 1 of 2 ended before its work was done; see its output" in errors
    assert "Traceback" not in errors


def test_job_that_does_not_assemble_is_a_line_with_the_variables():
    variables = SLURM | {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": "0",
        "LIT_FAST_CLUSTER_TIMEOUT": "0.2",
    }
    error = run("with distributed_job(): pass", **variables).stderr.splitlines()[-1]
    assert (
        "process 0 of 4 waited 0 s at localhost:61447 for processes 1, 2 and 3, which did not come" in error
    )
    assert "SLURM_NTASKS=4, SLURM_PROCID=0, SLURM_STEP_NODELIST=localhost" in error


def test_interactive_slurm_step_of_one_task_is_one_process():
    step = {
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    code = "with distributed_job(): print(process_rank(), jax.config.values['jax_cuda_visible_devices'])"
    assert run(code, **SLURM | step).stdout == "(0, 1) all\n"


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        (SLURM | {"SLURM_STEP_NODELIST": "node[003-015],other"}, "node003:61447"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7,gpu9"}, "gpu7:61447"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu7", "JAX_COORDINATOR_PORT": "99"}, "gpu7:99"),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
            "10.96.0.1:62624",
        ),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620::2]:43370"},
            "[fe80::b9b]:62880",
        ),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.0.0.7:43370"}, "10.0.0.7:62880"),
        (POD, "a:8482"),
        (POD | {"MEGASCALE_COORDINATOR_ADDRESS": "x:1"}, "x:8482"),
        (POD | {"TPU_WORKER_HOSTNAMES": "n:0:10.0.0.1,n:1:10.0.0.2"}, "10.0.0.1:8482"),
    ],
)
def test_address_of_process_0_is_the_one_that_jax_chooses(variables, address, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert coordinator_address() == address


@pytest.mark.parametrize("name", ["gpuu", "cuda"])
def test_device_that_is_not_there_is_a_line_of_a_command(name):
    command = [sys.executable, "-m", "lit_fast", "plan", "flickr8k_cpu", "--topology", "cpu"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": name}, capture_output=True, text=True)
    if done.returncode:  # not on a machine with that device
        assert done.returncode == 2
        assert done.stderr.startswith(f"lit-fast: error: the device of JAX_PLATFORMS={name} cannot be used: ")
        assert done.stderr.count("\n") == 1
