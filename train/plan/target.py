"""The devices of a plan, present or absent."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lit_fast.errors import UserError, first_line
from lit_fast.runtime import make_mesh
from lit_fast.storage.machine import has_nvidia_gpu
from lit_fast.train.cost.aot import gpu_mesh, tpu_mesh
from lit_fast.train.cost.hardware import GPUS, TPUS, Chip, chip_of, this_processor
from lit_fast.train.cost.memory import device_memory
from lit_fast.train.plan.slices import canonical, number_of_hosts, sold_as
from lit_fast.utils.output import status


class Target(NamedTuple):
    """A number of equal devices."""

    topology: str  # canonical, see `lit_fast.train.plan.slices`
    chip: Chip
    devices: int
    mesh: Mesh | None  # None: there is no compiler for them
    no_compiler: str = ""  # why, and what to do

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return "tpu" if self.chip in TPUS else "cpu" if self.topology == "cpu" else "gpu"

    @property
    def name(self) -> str:
        """The cloud's name."""
        return sold_as(self.topology)

    @property
    def hosts(self) -> int:
        """The number of machines."""
        return number_of_hosts(self.topology, self.devices)


def select_platforms(topologies: Sequence[str]) -> None:
    """Let JAX start no more than the plan needs: never a TPU, and a GPU only where one is here and asked for.

    Call it before JAX starts. Elsewhere JAX's CUDA package fails with a traceback where there is no driver, and
    starting a TPU takes it from other processes.
    """
    wanted = False
    for topology in topologies:
        with suppress(UserError):
            wanted |= canonical(topology).startswith("gpu:")
    if wanted and has_nvidia_gpu() and _has_cuda_plugin():
        jax.config.update("jax_platforms", "cuda,cpu")
        try:
            jax.devices()
            return
        except RuntimeError as error:
            status(f"the GPU of this machine cannot be used: {first_line(error)}")
    jax.config.update("jax_platforms", "cpu")


def open_target(topology: str) -> Target:
    """Return the devices of `--topology`. A TPU of this machine is not accessed.

    Raises:
      UserError: chip or slice do not exist, or libtpu is missing.
    """
    given, topology = topology, canonical(topology)
    name, _, size = topology.partition(":")
    if name == "gpu":
        return _gpus(topology, size)
    if topology == "cpu":
        mesh = make_mesh(jax.devices("cpu"))
        return Target("cpu", this_processor(mesh.size, device_memory(mesh)), mesh.size, mesh)
    chip = next(chip for chip in TPUS if chip.name == name)
    try:
        mesh = tpu_mesh(topology)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(
                f"--topology {given} needs the TPU compiler, which runs on any x86-64 Linux machine; run: pip install "
                "'lit-fast[tpu]'"
            ) from None
        raise UserError(
            f"--topology {given} is refused by libtpu: {first_line(error)}; name another slice"
        ) from None
    return Target(topology, chip, mesh.size, mesh)


def _gpus(topology: str, size: str) -> Target:
    name, _, count = size.partition(":")
    chip, devices = next(chip for chip in GPUS if chip.name == name), int(count or "1")
    present = [device for device in jax.devices() if chip_of(device.device_kind) == chip]
    if len(present) >= devices:
        mesh = make_mesh(present[:devices])
        return Target(topology, chip._replace(memory=device_memory(mesh)), devices, mesh)
    if not _has_cuda_plugin():
        return Target(topology, chip, devices, None, f"no compiler for GPUs is installed; {_installation()}")
    try:
        return Target(topology, chip, devices, gpu_mesh(chip, devices))
    except RuntimeError as error:
        reason = f"the compiler for GPUs cannot be used: {first_line(error, 120)}; {_installation()}"
        return Target(topology, chip, devices, None, reason)


def _has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def _installation() -> str:
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        return "pip install 'lit-fast[plan-gpu]', 250 MB, compiles the step without a GPU"
    return "on a Linux machine with x86-64, pip install 'lit-fast[plan-gpu]' compiles the step without a GPU"
