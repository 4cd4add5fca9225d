"""Count the instructions of the attention kernels for TPUs, from the schedules of TPU's compiler; no TPU is needed.

    pip install libtpu; python -m benchmarks.attention_kernels [--chips v4 v6e]

A kernel without loops runs its bundles once per step of its grid, one bundle a cycle unless it waits for memory.
The figures are those of `BUNDLES` in lit_fast/train/cost/kernels.py; the exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lit_fast.models.packed_attention import kernel_name
from lit_fast.train.cost.kernels import BUNDLES, HEADS, ROW_TOKENS, SIZE

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ROWS = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_kernel(*args.compile)
        return 0
    wrong = 0
    kinds = list(BUNDLES["v4"])
    names = [f"{direction}, {f'captions of {length}' if length else 'masked'}" for direction, length in kinds]
    print(f"| chip | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for chip in args.chips:
        found = [bundles(chip, *kind) for kind in kinds]
        listed = [BUNDLES[chip][kind] for kind in kinds]
        notes = ["" if f == b else f" (listed: {b:,})" for f, b in zip(found, listed, strict=True)]
        wrong += found != listed
        print(
            f"| {chip} | {' | '.join(f'{f:,}{n}' for f, n in zip(found, notes, strict=True))} |", flush=True
        )
    return int(wrong > 0)


def bundles(chip: str, direction: str, length: int | None) -> int:
    """Return the number of bundles of the final schedule of a kernel of HEADS heads, for a row of 128 tokens."""
    with TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
        command = [sys.executable, "-m", "benchmarks.attention_kernels", "--compile"]
        subprocess.run(
            [*command, TOPOLOGIES[chip], direction, str(length or 0)],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
            stdout=sys.stderr,
        )
        name = kernel_name(direction, length, HEADS, SIZE)
        (file,) = Path(directory).glob(f"*{name}*final_hlo-static-per-bundle-utilization.txt")
        # Four lines of headings, then a line for each bundle.
        return sum(1 for line in file.read_text().splitlines()[4:] if line.strip())


def compile_kernel(topology: str, direction: str, length: str) -> None:
    """Compile a kernel for a chip that may be absent; libtpu writes its schedules as it is configured."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from lit_fast.models import packed_attention
    from lit_fast.train.cost.aot import tpu_mesh

    sharding = SingleDeviceSharding(tpu_mesh(topology).devices.flat[0])

    def array(*shape: int, dtype: jnp.dtype = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    width = HEADS * SIZE
    qkv, captions = array(ROWS, 3 * width, ROW_TOKENS), array(ROWS, ROW_TOKENS, dtype=jnp.int32)
    layout = int(length)
    if direction == "forward":
        jax.jit(lambda u, c: packed_attention.forward(u, layout or c, HEADS)).lower(qkv, captions).compile()
    else:
        g, bias = array(ROWS, width, ROW_TOKENS), array(3 * width, dtype=jnp.float32)
        jax.jit(lambda u, c, g, b: packed_attention.backward(u, layout or c, HEADS, g, b)).lower(
            qkv, captions, g, bias
        ).compile()


if __name__ == "__main__":
    sys.exit(main())
