"""The dtype of matrix products by platform and processor."""

import pytest

from lit_fast.models.precision import fast_dtype, resolve_dtype


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", "bfloat16"),  # Sapphire Rapids
        ("flags\t\t: fpu avx512f avx512_bf16 avx_vnni\n", "bfloat16"),  # Zen 4 and 5, Cooper Lake
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", "float32"),  # Cascade Lake, Ice Lake
        ("Features\t: fp asimd sve bf16\n", "float32"),  # Arm: not measured
        ("", "float32"),
    ],
)
def test_fast_dtype_of_a_cpu_follows_its_flags(tmp_path, cpuinfo, dtype):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert fast_dtype("cpu", str(tmp_path)) == dtype
    assert fast_dtype("gpu", str(tmp_path)) == fast_dtype("tpu", str(tmp_path)) == "bfloat16"


def test_resolve_dtype_keeps_a_given_dtype():
    assert resolve_dtype("float32", "tpu") == "float32"
    assert resolve_dtype("bfloat16", "cpu") == "bfloat16"
    assert resolve_dtype("auto", "tpu") == "bfloat16"
