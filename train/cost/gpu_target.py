"""GPUs as XLA's compiler sees them, for compiling where no such GPU is.

XLA takes a `GpuTargetConfigProto` in text form. Versions of driver, cuDNN and cuBLAS and the rates of the units are
left out: only the autotuner reads them, which needs a real GPU. The buffers and loops of the program are the same.
"""

from __future__ import annotations

from typing import NamedTuple

from lit_fast.train.cost.hardware import GIB, JAX_SHARE, Chip


class _Architecture(NamedTuple):
    """What the GPUs of a compute capability have in common, from "CUDA C++ Programming Guide", compute capabilities."""

    fpus: int  # float32 units per multiprocessor
    threads: int  # per multiprocessor
    shared: int  # bytes of shared memory per multiprocessor


_ARCHITECTURES = {
    (8, 0): _Architecture(64, 2048, 167_936),
    (8, 9): _Architecture(128, 1536, 102_400),
    (9, 0): _Architecture(128, 2048, 233_472),
    (10, 0): _Architecture(128, 2048, 233_472),
}
# Compute capability, multiprocessors, MiB of level 2 cache, boost clock in GHz: NVIDIA's data sheets and white papers.
_GPUS = {
    "b200": ((10, 0), 148, 126, 1.965),
    "h200": ((9, 0), 132, 50, 1.98),
    "h100": ((9, 0), 132, 50, 1.98),
    "a100": ((8, 0), 108, 40, 1.41),
    "a100-40": ((8, 0), 108, 40, 1.41),
    "l40s": ((8, 9), 142, 96, 2.52),
    "l40": ((8, 9), 142, 96, 2.49),
    "l4": ((8, 9), 58, 48, 2.04),
    "rtx4090": ((8, 9), 128, 72, 2.52),
}
_SYSTEM_SHARED_BYTES = 1024  # of the shared memory of a block, not available to it


def gpu_target(chip: Chip) -> str:
    """Return XLA's description of a GPU in `hardware.GPUS`, a GpuTargetConfigProto in text form."""
    (major, minor), cores, cache, clock = _GPUS[chip.name]
    fpus, threads, shared = _ARCHITECTURES[major, minor]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - _SYSTEM_SHARED_BYTES}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {cache * 2**20}
  clock_rate_ghz: {clock}
  device_memory_size: {chip.memory / JAX_SHARE // GIB * GIB:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
device_description_str: "NVIDIA {chip.kind}"
"""
