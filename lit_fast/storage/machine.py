"""The machine or container that this process runs in: cores, the processor's flags, memory, open files."""

from __future__ import annotations

import ctypes
import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress

_CGROUPS = "sys/fs/cgroup"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def cpu_count(root: str = "/") -> int:
    """Return the number of CPU cores that this process may use: by its affinity and its cgroup's quota.

    Args:
      root: the directory that holds `proc` and `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for version, directory in _cgroups(root, "cpu"):
        if version == 2:
            quota, _, period = _read(directory, "cpu.max").partition(" ")
        else:
            quota, period = _read(directory, "cpu.cfs_quota_us"), _read(directory, "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            quotas.append(math.ceil(int(quota) / int(period)))
    return min([cores, *quotas])


def available_memory(root: str = "/") -> int:
    """Return the bytes of memory that this process may use: those of the machine, or fewer by its cgroup's limit.

    Args:
      root: the directory that holds `proc` and `sys`.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = []
    for version, directory in _cgroups(root, "memory"):
        if version == 2:
            limits += [_read(directory, "memory.max"), _read(directory, "memory.high")]
        else:
            limits.append(_read(directory, "memory.limit_in_bytes"))
            # A limit above the cgroups that a container shows.
            stat = dict(
                line.split(" ", 1) for line in _read(directory, "memory.stat").splitlines() if " " in line
            )
            limits.append(stat.get("hierarchical_memory_limit", ""))
    return min([machine, *(int(limit) for limit in limits if limit.isdecimal() and int(limit))])


def cpu_flags(root: str = "/") -> frozenset[str]:
    """Return the flags of the processor, such as "avx512_bf16"; none where the system does not list them.

    Args:
      root: the directory that holds `proc`.
    """
    for line in _read(root, "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def cached_files(most: int = 256) -> int:
    """Return the number of files that one cache may keep open: an eighth of this process's limit, or `most`."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit // 8))


def has_nvidia_gpu(root: str = "/") -> bool:
    """Return whether an NVIDIA driver offers a GPU, also under Windows' Linux (`dev/dxg`).

    Args:
      root: the directory that holds `dev`.
    """
    try:
        names = os.listdir(os.path.join(root, "dev"))
    except OSError:
        return False
    return any(name == "dxg" or (name.startswith("nvidia") and name[6:].isdecimal()) for name in names)


def has_tpu(root: str = "/") -> bool:
    """Return whether a TPU is attached: `dev/accel0` up to v4, `dev/vfio` of later ones.

    Args:
      root: the directory that holds `dev`.
    """
    return any(os.path.exists(os.path.join(root, "dev", name)) for name in ("accel0", "vfio"))


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory of the main thread for its next allocation, where there is no GPU or TPU.

    Other threads have arenas of their own, which cannot hold large blocks. A choice of the user's in the environment
    is left alone.

    Returns:
      Whether it does.
    """
    if has_nvidia_gpu() or has_tpu():
        return False
    chosen = (
        "MALLOC_ARENA_MAX",
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
        "GLIBC_TUNABLES",
        "LD_PRELOAD",
    )
    if any(os.environ.get(name) for name in chosen):
        return False
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(option, value) for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)))
    return False


def raise_open_file_limit() -> None:
    """Raise the limit of open files to the highest that this process may choose."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS refuses "unlimited"
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_standard_descriptors() -> None:
    """Connect those of the descriptors 0, 1 and 2 that are closed to the null device.

    Call it before any file is opened: a file that got descriptor 1 would receive what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _cgroups(root: str, controller: str) -> Iterator[tuple[int, str]]:
    """Yield the version and directory of every cgroup of this process that can be seen, from its own to the root.

    A container may see its own cgroup as the root, although `/proc/self/cgroup` has the machine's path.
    """
    base = os.path.join(root, _CGROUPS)
    for line in _read(root, "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version, mounts = 2, [base, os.path.join(base, "unified")]
        elif controller in controllers.split(","):
            version, mounts = 1, [os.path.join(base, controller), os.path.join(base, controllers)]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for count in range(len(parts), -1, -1):
                yield version, os.path.join(mount, *parts[:count])


def _read(directory: str, name: str) -> str:
    """Return the text of a file, stripped; "" where there is none."""
    try:
        with open(os.path.join(directory, name), encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
