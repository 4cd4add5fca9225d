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

from tests.embed.test_processes import environment, free_port

IMPORTS = "from lit_fast.runtime import initialize_distributed, process_rank; import jax\n"
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


@pytest.mark.parametrize("function", ["process_rank", "initialize_distributed"])
def test_incomplete_environment_is_refused(function):
    half = run(f"{function}()", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="1")
    assert "but not JAX_COORDINATOR_ADDRESS; set it" in half.stderr
    wrong = run(f"{function}()", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="4", JAX_COORDINATOR_ADDRESS="x:1")
    assert "JAX_PROCESS_ID '4' is not below JAX_NUM_PROCESSES '4'" in wrong.stderr


def test_initialize_distributed_alone_does_nothing():
    assert run("initialize_distributed(); print(jax.process_count())").stdout == "1\n"


def test_initialize_distributed_connects_all_processes_and_silences_all_but_the_first():
    code = (
        IMPORTS + "from lit_fast.utils.output import result\n"
        "from jax.experimental.multihost_utils import process_allgather\n"
        "initialize_distributed(); initialize_distributed()\n"
        "result('only the first')\n"
        "total = process_allgather(jax.numpy.ones(1) * (1 + process_rank()[0])).sum()\n"
        "print(process_rank(), jax.device_count(), int(total))"
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
