"""The one-day step on slices of TPU v4, v5e, v6e and v5p, by their compiler; no TPU is needed.

    pip install libtpu; python -m benchmarks.tpu_step [--topologies v4:2x2x1 v6e:2x2] [--attention pallas] [--masked]

Each line is one compiled program. Seconds are the compiler's estimate of cycles at the clock of the chip, and the
attention kernels, for which it has none, from their own schedules. Transfers between chips and instructions without an
estimate (gather, scatter, sort) are not counted. Nothing was run.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU is absent

import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe
from lit_fast.config import Config
from lit_fast.config_io import load_config
from lit_fast.models.precision import resolve_dtype
from lit_fast.models.text_tower import TextTower
from lit_fast.train.cost.aot import compile_step, tpu_mesh
from lit_fast.train.cost.flops import step_flops
from lit_fast.train.cost.hardware import TPUS
from lit_fast.train.cost.hlo import program_cost
from lit_fast.train.cost.kernels import attention_cycles
from lit_fast.train.cost.memory import choose_remat
from lit_fast.train.input_pipeline.packing import with_rows
from lit_fast.train.step import abstract_training

CONFIG = Path(__file__).parents[1] / "configs" / "siglit_b8_one_day.toml"
SLICES = ("v4:2x2x1", "v5e:2x2", "v6e:2x2", "v5p:2x2x1")
VOCAB, LENGTH, WIDTH = 32_000, 16, 768
LENGTHS = np.linspace(9, 16, 1024).round().astype(np.int64)  # of captions with 22 % padding
HEADER = (
    "| slice | attention | padding | rows of 128 tokens | text.keep | microbatches | GiB per chip | XLA, s "
    "| kernels, s | a step, s | MFU | hours for 65,000 steps | compiled, CPU s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(topology: str, attention: str, masked: bool, keep: str, microbatches: int) -> str:
    """Compile one step and return its line; `keep` "auto" chooses as a training does, without kernels."""
    config: Config = load_config(CONFIG)
    text = replace(
        config.text, keep=keep, microbatches=microbatches, attention=attention, mask_padding=masked
    )
    mesh, chip = tpu_mesh(topology), next(c for c in TPUS if c.name == topology.split(":")[0])
    texts = config.stream.global_batch
    if masked:
        text = with_rows(text, LENGTHS, texts // mesh.size, LENGTH, mesh.size)
    config = replace(config, text=text)

    def build(text: object) -> TextTower:
        eos_id = 1 if masked else None
        dtype = jnp.dtype(resolve_dtype(config.text.dtype, "tpu"))
        return TextTower(
            config.text.shape, VOCAB, LENGTH, WIDTH, pack=config.text.pack, eos_id=eos_id, dtype=dtype
        )

    model = build(text)
    optimizer, state = abstract_training(model, config)
    start = sum(os.times()[:2])
    if keep == "auto":
        fit = choose_remat(config, build, mesh, optimizer, state, int(chip.memory))
        text, step = fit.text, fit.compiled
    else:
        step = compile_step(model, config, mesh, optimizer, state)
    assert step is not None
    seconds = program_cost(step.text).cycles / chip.clock
    kernels = program_cost(step.text, partial(attention_cycles, chip.name)).cycles / chip.clock - seconds
    flops = step_flops(model, texts, texts, tokens=float(LENGTHS.mean()) if masked else None) / mesh.size
    rows = text.rows or texts // text.pack
    total = seconds + kernels
    padding = "masked" if masked else "attended to"
    return (
        f"| {topology} | {attention} | {padding} | {rows:,} | {text.keep} | {text.microbatches} "
        f"| {step.bytes / 2**30:.1f} of {chip.memory / 2**30:.2f} | {seconds:.3f} | {kernels:.3f} | {total:.3f} "
        f"| {flops / total / chip.flops:.0%} | {total * 65_000 / 3600:.1f} | {sum(os.times()[:2]) - start:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=SLICES)
    parser.add_argument("--attention", nargs="+", choices=("xla", "pallas"), default=("xla", "pallas"))
    parser.add_argument("--masked", action="store_true", help="captions packed by their true lengths")
    parser.add_argument("--keep", default="hidden")
    parser.add_argument("--microbatches", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{describe('jax', 'libtpu')}\n\n{HEADER}", flush=True)
    for topology in arguments.topologies:
        for attention in arguments.attention:
            print(
                line(topology, attention, arguments.masked, arguments.keep, arguments.microbatches),
                flush=True,
            )


if __name__ == "__main__":
    main()
