"""Cycles of the attention kernels, for which XLA gives no estimate, from the schedules of TPU's compiler.

A kernel has no loop: each step of its grid runs the same bundles of instructions, one a cycle unless it waits for
memory. The operands and results of a step are in transfer while its neighbours are computed, and take less time.
Where XLA has an estimate, it is 1.07 times the bundles of its own schedules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# Bundles of a row of 128 tokens and 16 heads of size 64, by chip and (direction, tokens of every caption; None: true
# lengths). `python -m benchmarks.attention_kernels` counts them: jax 0.10.2, libtpu 0.0.42.1. Never run on a chip.
FORWARD, BACKWARD = "forward", "backward"
BUNDLES: dict[str, dict[tuple[str, int | None], int]] = {
    "v4": {(FORWARD, 16): 1784, (BACKWARD, 16): 2919, (FORWARD, None): 2655, (BACKWARD, None): 4130},
    "v5e": {(FORWARD, 16): 1609, (BACKWARD, 16): 2513, (FORWARD, None): 2245, (BACKWARD, None): 2821},
    "v5p": {(FORWARD, 16): 1668, (BACKWARD, 16): 2577, (FORWARD, None): 2286, (BACKWARD, None): 2908},
    "v6e": {(FORWARD, 16): 934, (BACKWARD, 16): 3643, (FORWARD, None): 1068, (BACKWARD, None): 4508},
}
HEADS, SIZE, ROW_TOKENS = (
    16,
    64,
    128,
)  # of the table; the heads are unrolled, so bundles are proportional to their number
_CORES = {"v4": 2, "v5p": 2}  # of a device, between which the grid is divided
_NAME = re.compile(r"attention_(forward|backward)_(?:length(\d+)|masked)_(\d+)x(\d+)")


def attention_cycles(chip: str, name: str, shapes: Sequence[str]) -> float | None:
    """Return the cycles of one run of an attention kernel on a device; None: not an attention kernel, or unknown.

    Args:
      chip: such as "v4".
      name: of the kernel in the compiled program, from `lit_fast.models.packed_attention.kernel_name`.
      shapes: of its operands, the first such as "bf16[512,3072,128]": rows, 3 width, tokens.
    """
    match = _NAME.search(name)
    array = re.search(r"\[(\d+),\d+,(\d+)\]", shapes[0]) if shapes else None
    if not match or not array:
        return None
    direction, length, heads, size = (
        match[1],
        int(match[2]) if match[2] else None,
        int(match[3]),
        int(match[4]),
    )
    rows, blocks = int(array[1]), -(-int(array[2]) // ROW_TOKENS)
    bundles = BUNDLES.get(chip, {}).get((direction, length))
    if bundles is None or size != SIZE or (length is None and blocks > 1):
        return None
    steps = math.ceil(rows * blocks / _CORES.get(chip, 1))
    return steps * bundles * heads / HEADS
