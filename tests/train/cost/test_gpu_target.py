"""GPUs that are not here: their descriptions, and programs compiled for them where the compiler is installed."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from lit_fast.runtime import batch_sharding, replicated
from lit_fast.train.cost.aot import gpu_mesh
from lit_fast.train.cost.gpu_target import gpu_target
from lit_fast.train.cost.hardware import GPUS
from lit_fast.train.cost.hlo import program_cost


@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_gpu_target_describes_every_gpu(chip):
    text = gpu_target(chip)
    assert text.count("{") == text.count("}") == 2
    assert float(re.search(r"memory_bandwidth: (\d+)\n", text)[1]) == pytest.approx(chip.bandwidth)
    # What JAX takes of a real GPU is three quarters of this.
    assert abs(int(re.search(r"device_memory_size: (\d+)\n", text)[1]) * 0.75 - chip.memory) < 2**30


@pytest.fixture
def compiler():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the extra plan-gpu is not installed")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("chip", GPUS, ids=lambda chip: chip.name)
def test_gpu_mesh_compiles_for_every_gpu(chip):
    mesh = gpu_mesh(chip, 2)  # compiles a small program
    assert [d.platform for d in mesh.devices.flat] == ["gpu", "gpu"]
    assert chip.kind in mesh.devices.flat[0].device_kind


@pytest.mark.usefixtures("compiler")
def test_program_for_sixteen_gpus_on_two_hosts_has_its_collectives():
    mesh = gpu_mesh(next(chip for chip in GPUS if chip.name == "h100"), 16)
    assert {d.process_index for d in mesh.devices.flat} == {0, 1}
    x = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=batch_sharding(mesh))
    w = jax.ShapeDtypeStruct((32, 32), jnp.bfloat16, sharding=replicated(mesh))
    compiled = jax.jit(jax.grad(lambda w, x: jnp.tanh(x @ w).astype(jnp.float32).sum())).lower(w, x).compile()
    cost = program_cost(compiled.as_text())
    assert cost.collectives["all-reduce"].calls == 1
    assert 2 <= cost.kernels <= 12
    assert compiled.memory_analysis().temp_size_in_bytes > 0
