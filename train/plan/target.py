"""The devices of a plan, present or absent."""

from __future__ import annotations

import importlib.util
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lit_fast.errors import UserError, first_line
from lit_fast.runtime import make_mesh
from lit_fast.train.cost.aot import tpu_mesh
from lit_fast.train.cost.hardware import GPUS, TPUS, Chip, chip_of, this_processor
from lit_fast.train.cost.memory import device_memory

_EXAMPLES = "v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2, gpu:h200, gpu:h100:8 or cpu"


class Target(NamedTuple):
    """A number of equal devices."""

    topology: str
    chip: Chip
    devices: int
    mesh: Mesh | None  # None: there is no compiler for them

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return "tpu" if self.chip in TPUS else "gpu" if self.chip in GPUS else "cpu"


def open_target(topology: str) -> Target:
    """Return the devices of `--topology`. A TPU of this machine is not accessed.

    Raises:
      UserError: chip or slice do not exist, or libtpu is missing.
    """
    name, _, size = topology.partition(":")
    if name == "gpu":
        return _gpus(topology, size)
    jax.config.update("jax_platforms", "cpu")
    if topology == "cpu":
        mesh = make_mesh()
        return Target("cpu", this_processor(mesh.size, device_memory(mesh)), mesh.size, mesh)
    chip = next((chip for chip in TPUS if chip.name == name), None)
    if chip is None:
        raise UserError(f"--topology {topology}: chip {name!r} is unknown; write {_EXAMPLES}")
    try:
        mesh = tpu_mesh(topology)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(
                f"--topology {topology} needs the TPU compiler, which runs on any x86-64 Linux machine; pip install "
                "'lit-fast[tpu]'"
            ) from None
        raise UserError(f"--topology {topology} is refused by libtpu: {first_line(error)}") from None
    return Target(topology, chip, mesh.size, mesh)


def _gpus(topology: str, size: str) -> Target:
    name, _, count = size.partition(":")
    chip = next((chip for chip in GPUS if chip.name == name), None)
    if chip is None:
        raise UserError(
            f"--topology {topology}: GPU {name!r} is unknown; write gpu:NAME or gpu:NAME:COUNT with one of "
            f"{', '.join(chip.name for chip in GPUS)}"
        )
    if not re.fullmatch(r"[1-9]\d{0,3}", count or "1"):
        raise UserError(f"--topology {topology}: {count!r} is not a number of GPUs; write gpu:{name}:8")
    devices = int(count or "1")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        jax.config.update("jax_platforms", "cpu")  # do not access a TPU, which another process may use
    present = [device for device in jax.devices() if chip_of(device.device_kind) == chip]
    if len(present) < devices:
        return Target(topology, chip, devices, None)
    mesh = make_mesh(present[:devices])
    return Target(topology, chip._replace(memory=device_memory(mesh)), devices, mesh)
