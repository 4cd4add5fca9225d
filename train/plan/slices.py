"""Names of slices: those of the clouds, and `CHIP:SHAPE` or `gpu:NAME:COUNT`, as `lit-fast plan` computes with them."""

from __future__ import annotations

import difflib
import math
import re

from lit_fast.errors import UserError
from lit_fast.train.cost.aot import GPUS_PER_HOST
from lit_fast.train.cost.hardware import GPUS, TPUS

EXAMPLES = "v4-8, v5litepod-4, v5p-8, v6e-4, v4:2x2x1, h200, h100:8, gpu:a100:8, a3-highgpu-8g or cpu"

# The shapes that Google sells, by chips. A v4-8 and a v5p-8 have 8 cores on 4 chips; other names count chips.
_SHAPES_3D = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
}  # fmt: skip
_SHAPES_2D = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
# By chip: the start of the slice's name, what it counts for each chip, the shapes.
_TPU_SLICES = {
    "v4": ("v4-", 2, _SHAPES_3D),
    "v5p": ("v5p-", 2, _SHAPES_3D),
    "v5e": ("v5litepod-", 1, _SHAPES_2D),
    "v6e": ("v6e-", 1, _SHAPES_2D),
}
# Names of machines: Google Cloud's, then those of AWS and Azure. The first name of equal machines is shown.
_MACHINES = {
    "ct4p-hightpu-4t": "v4:2x2x1", "ct5p-hightpu-4t": "v5p:2x2x1", "ct5lp-hightpu-1t": "v5e:1x1",
    "ct5lp-hightpu-4t": "v5e:2x2", "ct5lp-hightpu-8t": "v5e:2x4", "ct6e-standard-1t": "v6e:1x1",
    "ct6e-standard-4t": "v6e:2x2", "ct6e-standard-8t": "v6e:2x4",
    "a2-highgpu-1g": "gpu:a100-40", "a2-highgpu-2g": "gpu:a100-40:2", "a2-highgpu-4g": "gpu:a100-40:4",
    "a2-highgpu-8g": "gpu:a100-40:8", "a2-ultragpu-1g": "gpu:a100", "a2-ultragpu-2g": "gpu:a100:2",
    "a2-ultragpu-4g": "gpu:a100:4", "a2-ultragpu-8g": "gpu:a100:8", "a3-highgpu-1g": "gpu:h100",
    "a3-highgpu-2g": "gpu:h100:2", "a3-highgpu-4g": "gpu:h100:4", "a3-highgpu-8g": "gpu:h100:8",
    "a3-megagpu-8g": "gpu:h100:8", "a3-ultragpu-8g": "gpu:h200:8", "a4-highgpu-8g": "gpu:b200:8",
    "g2-standard-4": "gpu:l4", "g2-standard-24": "gpu:l4:2", "g2-standard-48": "gpu:l4:4", "g2-standard-96": "gpu:l4:8",
    "p4d.24xlarge": "gpu:a100-40:8", "p4de.24xlarge": "gpu:a100:8", "p5.48xlarge": "gpu:h100:8",
    "p5e.48xlarge": "gpu:h200:8", "p5en.48xlarge": "gpu:h200:8", "p6-b200.48xlarge": "gpu:b200:8",
    "standard_nd96isr_h100_v5": "gpu:h100:8", "standard_nd96isr_h200_v5": "gpu:h200:8",
}  # fmt: skip


def canonical(name: str, option: str = "--topology") -> str:
    """Return the name of a slice as `v4:2x2x1`, `gpu:h200:8` or `cpu`; a shape is not checked.

    Args:
      option: where it was given, for messages.

    Raises:
      UserError: the name is unknown; the message has near ones.
    """
    given, name = name, name.strip().lower()
    if name in _MACHINES:
        return _MACHINES[name]
    chip, _, size = (name + ":" if name == "gpu" else name).removeprefix("gpu:").partition(":")
    if any(chip == gpu.name for gpu in GPUS):
        if size and not re.fullmatch(r"[1-9]\d{0,3}", size):
            raise UserError(f"{option} {given}: {size!r} is not a number of GPUs; write gpu:{chip}:8")
        count = int(size or "1")
        if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
            raise UserError(
                f"{option} {given}: {count} GPUs are not whole hosts of {GPUS_PER_HOST}; write for example "
                f"gpu:{chip}:{math.ceil(count / GPUS_PER_HOST) * GPUS_PER_HOST}"
            )
        return f"gpu:{chip}:{count}" if count > 1 else f"gpu:{chip}"
    if name == "gpu" or name.startswith("gpu:"):
        raise UserError(
            f"{option} {given}: GPU {chip!r} is unknown; write gpu:NAME or gpu:NAME:COUNT with one of "
            f"{', '.join(gpu.name for gpu in GPUS)}"
        )
    if name == "cpu" or (size and any(chip == tpu.name for tpu in TPUS)):
        return name
    if sold := re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e)-(\d+)", name):
        tpu = sold[1].replace("litepod", "e")
        start, step, shapes = _TPU_SLICES[tpu]
        count = int(sold[2])
        if count % step == 0 and count // step in shapes:
            return f"{tpu}:{shapes[count // step]}"
        sizes = ", ".join(f"{start}{step * chips}" for chips in shapes)
        shape = "2x2x3" if shapes is _SHAPES_3D else "4x4"
        raise UserError(
            f"{option} {given}: no slice has this name; write {sizes}, or its shape, such as {tpu}:{shape}"
        )
    known = [*_MACHINES, *(gpu.name for gpu in GPUS)]
    known += [f"{start}{step * chips}" for start, step, shapes in _TPU_SLICES.values() for chips in shapes]
    near = difflib.get_close_matches(name, known, 1, 0.7)
    hint = f"did you mean {near[0]}?" if near else f"write {EXAMPLES}"
    raise UserError(f"{option} {given}: chip {chip!r} is unknown; {hint}")


def sold_as(topology: str) -> str:
    """Return the cloud's name of a slice in canonical form; the form itself where none is known."""
    chip, _, shape = topology.partition(":")
    if chip in _TPU_SLICES:
        start, step, shapes = _TPU_SLICES[chip]
        return next((f"{start}{step * chips}" for chips, s in shapes.items() if s == shape), topology)
    if chip == "gpu" and ":" not in shape:
        return shape
    return next((name for name, t in _MACHINES.items() if t == topology), topology)


def number_of_hosts(topology: str, devices: int) -> int:
    """Return the number of hosts of a slice in canonical form: machines with 4 chips, of v5e and v6e also with 8."""
    if topology == "cpu":
        return 1
    one_host = 4 if topology.startswith(("v4", "v5p")) else 8
    return 1 if devices <= one_host else math.ceil(devices / (8 if topology.startswith("gpu:") else 4))
