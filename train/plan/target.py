"""The devices that a plan is made for, here or not."""

from __future__ import annotations

import importlib.util
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lit_fast.errors import UserError
from lit_fast.runtime import make_mesh
from lit_fast.train.cost.aot import tpu_mesh
from lit_fast.train.cost.hardware import GPUS, TPUS, Chip, chip_of, this_processor
from lit_fast.train.cost.memory import device_memory

_FORMS = "v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2, gpu:h200, gpu:h100:8 or cpu"
# Slices of the two generations that are a plane; cloud.google.com/tpu/docs/v5e and v6e.
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Those in space: these, and beyond them multiples of 4 in each direction, up to so many chips.
_BLOCKS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_LARGEST = {"v4": 4096, "v5p": 8960}


class Target(NamedTuple):
    """A number of equal devices."""

    topology: str
    chip: Chip
    devices: int
    mesh: Mesh | None  # None: nothing can be compiled for them here

    @property
    def platform(self) -> str:
        """tpu, gpu or cpu."""
        return "tpu" if self.chip in TPUS else "gpu" if self.chip in GPUS else "cpu"


def open_target(topology: str) -> Target:
    """The devices of `--topology`. Nothing is asked of a TPU that this machine may have.

    Raises:
      UserError: there is no such chip or slice, or libtpu is missing.
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
        raise UserError(f"--topology {topology}: no such chip is known; write {_FORMS}")
    _check_slice(topology, name, size)
    try:
        mesh = tpu_mesh(topology)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(
                f"--topology {topology} needs the TPU's compiler, which runs on any x86-64 Linux machine: pip install "
                "'lit-fast[tpu]'"
            ) from None
        raise UserError(f"--topology {topology}: {str(error).splitlines()[0]}") from None
    return Target(topology, chip, mesh.size, mesh)


def _check_slice(topology: str, name: str, size: str) -> None:
    if name not in _LARGEST:
        if size not in _PLANES:
            raise UserError(f"--topology {topology}: slices of {name} are {', '.join(_PLANES)}")
        return
    sides = [int(side) for side in size.split("x")] if re.fullmatch(r"\d{1,4}x\d{1,4}x\d{1,4}", size) else []
    cubes = sides and not any(side % 4 for side in sides) and sides == sorted(sides)
    count = sides[0] * sides[1] * sides[2] if sides else 0
    if size not in _BLOCKS and not (cubes and 0 < count <= _LARGEST[name]):
        raise UserError(
            f"--topology {topology}: slices of {name} are {', '.join(_BLOCKS)}, and rising multiples of 4 such as "
            f"4x4x8, up to {_LARGEST[name]:,} chips"
        )


def _gpus(topology: str, size: str) -> Target:
    name, _, count = size.partition(":")
    chip = next((chip for chip in GPUS if chip.name == name), None)
    if chip is None:
        raise UserError(
            f"--topology {topology}: no such GPU is known; gpu: is followed by one of "
            f"{', '.join(chip.name for chip in GPUS)}, and :COUNT for several"
        )
    if not re.fullmatch(r"[1-9]\d{0,3}", count or "1"):
        raise UserError(f"--topology {topology}: {count!r} is no number of GPUs; write gpu:{name}:8")
    devices = int(count or "1")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        jax.config.update("jax_platforms", "cpu")  # not that of a TPU, which others may be using
    here = [device for device in jax.devices() if chip_of(device.device_kind) == chip]
    if len(here) < devices:
        return Target(topology, chip, devices, None)
    mesh = make_mesh(here[:devices])
    return Target(topology, chip._replace(memory=device_memory(mesh)), devices, mesh)
