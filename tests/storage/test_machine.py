"""The limits of the machine that a process runs in."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from lit_fast.storage.machine import (
    available_memory,
    cpu_count,
    cpu_flags,
    has_nvidia_gpu,
    has_tpu,
    raise_open_file_limit,
)

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
UNLIMITED = "9223372036854771712\n"  # of cgroup v1


def tree(root, cgroup, **files):
    """A root with `/proc/self/cgroup` and files of cgroups; __ stands for / and two dots for one."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def test_cpu_count_counts_the_cores_of_this_process():
    if hasattr(os, "sched_getaffinity"):
        assert cpu_count() <= len(os.sched_getaffinity(0))


def test_cpu_count_without_affinity_counts_all_cores(monkeypatch, tmp_path):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cpu_count(str(tmp_path)) == os.cpu_count()


def test_cpu_flags_are_those_of_the_first_processor(tmp_path):
    assert cpu_flags(str(tmp_path)) == frozenset()
    (tmp_path / "proc").mkdir()
    text = "processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu avx2\nbugs\t\t: x\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert cpu_flags(str(tmp_path)) == {"fpu", "avx2"}


V2 = "0::/kubepods/pod1/box\n"
V1 = "5:cpu,cpuacct:/docker/box\n4:memory:/docker/box\n1:name=systemd:/\n0::/\n"
AT = "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (V2, {f"{AT}kubepods/pod1/box/memory.max": "1000000\n"}, 1_000_000),
        (V2, {f"{AT}kubepods/pod1/box/memory.max": "max\n", f"{AT}kubepods/memory.max": "2000000\n"}, 2_000_000),
        (V2, {f"{AT}kubepods/pod1/box/memory.max": "max", f"{AT}kubepods/pod1/memory.high": "3000"}, 3000),
        (V2, {f"{AT}memory.max": "4000000\n"}, 4_000_000),  # the container sees its own cgroup as the root
        (V2, {f"{AT}kubepods/pod1/box/memory.max": "max\n"}, MACHINE),
        (V2, {f"{AT}memory.max": f"{MACHINE * 2}\n"}, MACHINE),
        (V2, {f"{AT}memory.max": "nonsense\n"}, MACHINE),
        ("0::/../outside\n", {f"{AT}memory.max": "4000000\n"}, 4_000_000),
        (V1, {f"{AT}memory/docker/box/memory.limit_in_bytes": "5000000\n"}, 5_000_000),
        (V1, {f"{AT}memory/memory.limit_in_bytes": "6000000\n"}, 6_000_000),
        (V1, {f"{AT}memory/memory.limit_in_bytes": UNLIMITED}, MACHINE),
        (
            V1,
            {
                f"{AT}memory/memory.limit_in_bytes": UNLIMITED,
                f"{AT}memory/memory.stat": "cache 1\nhierarchical_memory_limit 7000000\n",
            },
            7_000_000,
        ),
        (V1, {f"{AT}unified/memory.max": "8000000"}, 8_000_000),
        ("", {}, MACHINE),
    ],
    ids=[
        "v2", "v2 above", "v2 high", "v2 root", "v2 max", "v2 more than the machine", "v2 damaged", "v2 outside",
        "v1", "v1 root", "v1 unlimited", "v1 hierarchical", "hybrid", "none",
    ],
)  # fmt: skip
def test_available_memory_is_the_smallest_limit_of_the_cgroups(tmp_path, cgroup, files, expected):
    assert available_memory(tree(tmp_path, cgroup, **files)) == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (V2, {f"{AT}kubepods/pod1/box/cpu.max": "50000 100000\n"}, 1),
        (V2, {f"{AT}kubepods/pod1/cpu.max": "100000 100000\n"}, 1),
        (V2, {f"{AT}cpu.max": "max 100000\n"}, None),
        (
            V1,
            {f"{AT}cpu,cpuacct/cpu.cfs_quota_us": "50000", f"{AT}cpu,cpuacct/cpu.cfs_period_us": "100000"},
            1,
        ),
        (V1, {f"{AT}cpu/cpu.cfs_quota_us": "-1", f"{AT}cpu/cpu.cfs_period_us": "100000"}, None),
    ],
    ids=["v2", "v2 above", "v2 max", "v1", "v1 unlimited"],
)
def test_cpu_count_is_limited_by_the_quota_of_the_cgroups(tmp_path, cgroup, files, expected):
    assert cpu_count(tree(tmp_path, cgroup, **files)) == (expected or cpu_count(str(tmp_path / "none")))


def test_available_memory_without_proc_and_sys_is_that_of_the_machine(tmp_path):
    assert available_memory(str(tmp_path)) == MACHINE


def test_raise_open_file_limit_raises_the_soft_limit_to_the_hard_one():
    code = (
        "import resource; from lit_fast.storage.machine import *\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 64)); assert cached_files() == 4\n"
        "raise_open_file_limit(); print(resource.getrlimit(resource.RLIMIT_NOFILE), cached_files(), cached_files(6))"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 64
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "(64, 64) 8 6\n"
    )


def test_raise_open_file_limit_leaves_the_hard_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), False),
        (("null", "nvidiactl", "nvidia-uvm"), False),
        (("nvidia0", "nvidiactl"), True),
        (("nvidia12",), True),
        (("dxg",), True),
    ],
)
def test_has_nvidia_gpu_by_the_devices_of_its_driver(tmp_path, names, found):
    assert not has_nvidia_gpu(str(tmp_path))
    for name in names:
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / name).touch()
    assert has_nvidia_gpu(str(tmp_path)) == found


@pytest.mark.parametrize("name", ["accel0", "vfio"])
def test_has_tpu_by_its_devices(tmp_path, name):
    assert not has_tpu(str(tmp_path))
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / name).touch()
    assert has_tpu(str(tmp_path))


FAULTS = """
import resource
from lit_fast.storage.machine import keep_freed_memory

print(keep_freed_memory())
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 * 2**20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such options")
@pytest.mark.parametrize("chosen", [False, True])
def test_keep_freed_memory_reuses_a_large_block_unless_the_user_chose(chosen):
    names = ("GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("MALLOC_")}
    environment |= {"MALLOC_ARENA_MAX": "4"} if chosen else {}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True)
    kept, faults = done.stdout.split()
    assert (kept, int(faults) > 10_000) == (str(not chosen), chosen), done.stderr  # of 16,384 pages
