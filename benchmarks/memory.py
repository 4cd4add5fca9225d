"""Memory of a step on four TPU v4 chips by batch size, from the compiler; no TPU is needed.

    pip install libtpu; python -m benchmarks.memory [--batches 8192 32768 131072 1048576]

The one-day recipe is compiled ahead of time for a v4-8 slice at each batch, with what `text.keep = "auto"`
chooses there. The loss alone is compared with two others, differentiated by JAX: one matrix of all pairs
(big_vision's form), and a ring whose backward pass stores every block (clip-jax's form). The exit status is 1 if
a program breaks a promise of the project.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU is absent

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from benchmarks.machine import describe
from lit_fast.config import Config, LossConfig, TextConfig
from lit_fast.config_io import load_config
from lit_fast.losses.accumulate import LossParams
from lit_fast.losses.contrastive import contrastive_loss
from lit_fast.losses.pairs import ImageSide, TextSide
from lit_fast.models.precision import resolve_dtype
from lit_fast.models.text_tower import TextTower
from lit_fast.runtime import AXIS, REPLICATED, SHARDED, batch_sharding, replicated, shard_map
from lit_fast.train.cost.aot import CompiledStep, compile_step, tpu_mesh
from lit_fast.train.cost.memory import choose_remat
from lit_fast.train.step import abstract_training

CONFIG = Path(__file__).parents[1] / "configs" / "siglit_b8_one_day.toml"
TOPOLOGY, HBM = "v4:2x2x1", 30.75  # GiB that a program may use on a chip
VOCAB, LENGTH, WIDTH = 32_000, 16, 768
PAPER, MILLION = 32_768, 1_048_576
GIB, MIB = 2**30, 2**20


def tower(text: TextConfig) -> TextTower:
    """Return the text tower of a configuration, as training builds it."""
    dtype = jnp.dtype(resolve_dtype(text.dtype, "tpu"))
    return TextTower(text.shape, VOCAB, LENGTH, WIDTH, pack=text.pack, dtype=dtype)


class Step(NamedTuple):
    """The whole step at one batch."""

    batch: int
    text: TextConfig
    compiled: CompiledStep

    @property
    def gib(self) -> float:
        return self.compiled.bytes / GIB


def whole_step(config: Config, mesh: Mesh, batch: int) -> Step:
    """Compile the step with the remat policy that is chosen for the batch."""
    config = replace(config, stream=replace(config.stream, global_batch=batch))
    training = abstract_training(tower(config.text), config)
    text = choose_remat(config, tower, mesh, *training, limit=int(HBM * GIB)).text
    return Step(batch, text, compile_step(tower(text), replace(config, text=text), mesh, *training))


def ours(
    images: jax.Array, texts: jax.Array, log_scale: jax.Array, bias: jax.Array, num_devices: int
) -> jax.Array:
    rows = lax.axis_index(AXIS) * len(images) + jnp.arange(len(images))
    return contrastive_loss(
        LossConfig(), num_devices, LossParams(texts, log_scale, bias), ImageSide(images, rows), TextSide(rows)
    )[0]


def _block(
    images: jax.Array, texts: jax.Array, log_scale: jax.Array, bias: jax.Array, own: jax.Array
) -> jax.Array:
    logits = jnp.exp(log_scale) * jnp.einsum("nd,md->nm", images, texts, precision="high") + bias
    label = jnp.where(own & jnp.eye(len(images), len(texts), dtype=bool), 1.0, -1.0)
    return -jnp.sum(jax.nn.log_sigmoid(label * logits))


def matrix(
    images: jax.Array, texts: jax.Array, log_scale: jax.Array, bias: jax.Array, num_devices: int
) -> jax.Array:
    everything = lax.all_gather(images, AXIS, tiled=True)
    logits = jnp.exp(log_scale) * jnp.einsum("nd,md->nm", texts, everything, precision="high") + bias
    own = lax.axis_index(AXIS) * len(texts) + jnp.arange(len(texts))
    label = jnp.where(own[:, None] == jnp.arange(len(everything))[None], 1.0, -1.0)
    return -jnp.sum(jax.nn.log_sigmoid(label * logits)) / len(everything)


def plain_ring(
    images: jax.Array, texts: jax.Array, log_scale: jax.Array, bias: jax.Array, num_devices: int
) -> jax.Array:
    total = jnp.zeros(())
    for rotation in range(num_devices):
        total += _block(images, texts, log_scale, bias, jnp.array(rotation == 0))
        images = lax.ppermute(images, AXIS, [(i, (i + 1) % num_devices) for i in range(num_devices)])
    return total / (len(texts) * num_devices)


def loss_alone(loss: Callable, mesh: Mesh, batch: int) -> int | None:
    """Return the temporary bytes of the loss and its gradients; None: it does not fit."""

    def gradients(images: jax.Array, texts: jax.Array, log_scale: jax.Array, bias: jax.Array) -> tuple:
        return jax.value_and_grad(partial(loss, images, num_devices=mesh.size), (0, 1, 2))(
            texts, log_scale, bias
        )

    def compute(*arrays: jax.Array) -> tuple:
        loss, (dtexts, *others) = gradients(*arrays)
        return lax.psum(loss, AXIS), (dtexts, *lax.psum(others, AXIS))

    specs = (SHARDED, SHARDED, REPLICATED, REPLICATED)
    mapped = shard_map(compute, mesh, specs, (REPLICATED, specs[1:]))
    rows = jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16, sharding=batch_sharding(mesh))
    texts = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=batch_sharding(mesh))
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    try:
        made = jax.jit(mapped).lower(rows, texts, one, one).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    memory = made.memory_analysis()
    return memory.temp_size_in_bytes  # type: ignore[union-attr]


def count(step: Step, collective: str) -> int:
    """Return the number of a collective's instructions; one inside a loop counts once."""
    return step.compiled.text.count(f" {collective}(") + step.compiled.text.count(f" {collective}-start(")


def broken(steps: list[Step], losses: dict[int, int | None]) -> list[str]:
    """Return the promises that are broken."""
    wrong = []
    for step in steps:
        spare = HBM - step.gib
        if spare < (2 if step.batch == PAPER else 0):
            wrong.append(f"batch {step.batch:,} leaves {spare:.2f} GiB")
        if count(step, "all-gather"):
            wrong.append(f"batch {step.batch:,} gathers")
        sent = re.findall(r"= \(?(\w+\[[\d,]*\])\S* collective-permute(?:-start)?\(", step.compiled.text)
        if any(not re.fullmatch(rf"(bf16|f32)\[\d+,\d+,{WIDTH}\]|s32\[\d+,\d+\]", shape) for shape in sent):
            wrong.append(f"batch {step.batch:,} sends {', '.join(sent)} around the ring")
    for batch, bound in ((PAPER, 49 * MIB), (MILLION, 4.4 * GIB)):
        found = losses.get(batch, 0)
        if found is None or found > bound:
            wrong.append(f"the loss at batch {batch:,} takes {found} bytes, more than {bound:,.0f}")
    return wrong


def plot(steps: list[Step], losses: dict[str, dict[int, int | None]], out: Path) -> None:
    """Plot the memory of step and loss over the batch, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure((5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([s.batch for s in steps], [s.gib for s in steps], "k-s", label="whole step, ours")
    for name, found in losses.items():
        points = [(batch, size / GIB) for batch, size in found.items() if size]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"loss alone, {name}")
    axes.axhline(HBM, color="grey", linestyle=":", label="a v4 chip")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="batch on four chips", ylabel="GiB a chip")
    axes.set_xticks([s.batch for s in steps], [f"{s.batch:,}" for s in steps], rotation=20)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(out, metadata={"Date": None})


def shown(size: int | None) -> str:
    return "does not fit" if size is None else f"{size / MIB:,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, PAPER, 131_072, MILLION])
    args = parser.parse_args()
    try:
        mesh = tpu_mesh(TOPOLOGY)
    except RuntimeError as error:
        sys.exit(f"libtpu does not load ({str(error).splitlines()[0]}); pip install libtpu")
    config = load_config(CONFIG)
    print(describe("jax", "libtpu") + f"; compiled for {TOPOLOGY}\n")
    steps = []
    print(
        "| batch | text.keep | microbatches | arguments, GiB | temporaries, GiB | of 30.75 | gather / reduce / permute "
        "| compiled, s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for batch in args.batches:
        step = whole_step(config, mesh, batch)
        steps.append(step)
        counts = [str(count(step, name)) for name in ("all-gather", "all-reduce", "collective-permute")]
        print(
            f"| {batch:,} | {step.text.keep} | {step.text.microbatches} | {step.compiled.argument_bytes / GIB:.2f} "
            f"| {step.compiled.temporary_bytes / GIB:.2f} | {step.gib / HBM:.0%} | {' / '.join(counts)} | "
            f"{step.compiled.seconds:.0f} |",
            flush=True,
        )
    forms = {"ours": ours, "one matrix": matrix, "ring, blocks stored": plain_ring}
    losses = {name: {b: loss_alone(form, mesh, b) for b in args.batches} for name, form in forms.items()}
    print(f"\n| batch | {' | '.join(f'{name}, MiB' for name in forms)} |\n|---|{'---|' * len(forms)}")
    for batch in args.batches:
        print(f"| {batch:,} | {' | '.join(shown(found[batch]) for found in losses.values())} |")
    plot(steps, losses, Path(__file__).with_name("memory.svg"))
    if wrong := broken(steps, losses["ours"]):
        sys.exit("broken: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
