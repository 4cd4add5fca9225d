"""Peak rates of TPUs and GPUs from data sheets, and a measurement of this machine's CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GIB = 2**30


class Chip(NamedTuple):
    """One device as JAX sees it."""

    name: str  # in --topology
    kind: str  # part of JAX's device_kind
    flops: float  # peak of dense bfloat16 products, FLOP/s
    memory: float  # bytes available to a program
    bandwidth: float  # of the memory, bytes/s
    interconnect: float  # out of the chip over all links, bytes/s
    clock: float = 0.0  # of the TensorCore, Hz; 0: the compiler estimates no cycles
    float32: float = 0.0  # peak of float32 products on a GPU, FLOP/s

    @property
    def title(self) -> str:
        """The name that the cloud uses: `TPU v5e`, where JAX has `TPU v5 lite`."""
        return f"TPU {self.name}" if self.kind.startswith("TPU") else self.kind

    def passes(self, dtype: jnp.dtype, precision: str) -> float:
        """Return the time of a product, as a multiple of its FLOPs at the bfloat16 peak.

        Args:
          dtype: of the operands.
          precision: DEFAULT, HIGH or HIGHEST, of `jax.lax.Precision`.
        """
        if self.kind.startswith("TPU"):  # float32 as sums of bfloat16 products
            return {"HIGH": 3.0, "HIGHEST": 6.0}.get(precision, 1.0) if dtype == jnp.float32 else 1.0
        if self.float32 and dtype == jnp.float32:  # otherwise TF32
            return self.flops / self.float32 if precision == "HIGHEST" else 2.0
        return 1.0


# Peak and bandwidths: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Memory: as the compiler reports it when it refuses a
# program. Clock of v4: "TPU v4" (Jouppi et al., 2023, table 4), where peak = matrix units x clock; the other clocks
# follow from their peaks in the same way.
TPUS = (
    Chip("v4", "TPU v4", 275e12, 30.75 * GIB, 1.228e12, 300e9, 1.05e9),
    Chip("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 0.819e12, 200e9, 1.5e9),
    Chip("v5p", "TPU v5", 459e12, 95.74 * GIB, 2.765e12, 600e9, 1.75e9),
    Chip("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1.64e12, 448e9, 1.75e9),
)
# JAX allocates 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
JAX_SHARE = 0.75
# Data sheets at nvidia.com/data-center (SXM where there are several); interconnect: NVLink in one direction, or PCIe;
# memory: as nvidia-smi reports it; read in 2025.
GPUS = tuple(
    Chip(
        name,
        kind,
        tera * 1e12,
        gib * GIB * JAX_SHARE,
        bandwidth * 1e12,
        interconnect * 1e9,
        0.0,
        single * 1e12,
    )
    for name, kind, tera, single, gib, bandwidth, interconnect in (
        ("b200", "B200", 2250, 75, 178.4, 8.0, 900),
        ("h200", "H200", 989, 67, 140.4, 4.8, 450),
        ("h100", "H100", 989, 67, 79.6, 3.35, 450),
        ("a100", "A100", 312, 19.5, 80.0, 2.039, 300),
        ("a100-40", "A100-SXM4-40GB", 312, 19.5, 40.0, 1.555, 300),
        ("l40s", "L40S", 362, 91.6, 45.0, 0.864, 32),
        ("l40", "L40", 181, 90.5, 45.0, 0.864, 32),
        ("l4", "L4", 121, 30.3, 22.5, 0.3, 32),
        ("rtx4090", "RTX 4090", 165, 82.6, 24.0, 1.008, 32),
    )
)
# Other names that JAX uses for the same chips.
_KINDS = {"TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}


def chip_of(kind: str) -> Chip | None:
    """Return the chip of JAX's `device_kind`; None if it is unknown."""
    kind = _KINDS.get(kind, kind)
    # The longest match: "TPU v5" is part of "TPU v5 lite", and "L4" of "L40S".
    matches = [chip for chip in (*TPUS, *GPUS) if chip.kind in kind]
    return max(matches, key=lambda chip: len(chip.kind), default=None)


def peak_flops(device: jax.Device) -> float | None:
    """Return the peak FLOP/s in dense bfloat16 products; None for unknown chips."""
    chip = chip_of(device.device_kind)
    return chip.flops if chip else None


def this_processor(num_devices: int, memory: float) -> Chip:
    """Measure this machine's CPU with float32 products and copies.

    Args:
      num_devices: devices that share the CPU equally.
      memory: bytes per device.
    """
    size = 1536
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    flops = 2 * size**3 / _fastest(lambda: product(matrix).block_until_ready())
    source = np.ones(2**24, np.float32)  # larger than any cache
    target = np.empty_like(source)
    bandwidth = 2 * source.nbytes / _fastest(lambda: np.copyto(target, source))
    return Chip("cpu", "cpu", flops / num_devices, memory, bandwidth / num_devices, bandwidth / num_devices)


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(4):  # the first call compiles
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
