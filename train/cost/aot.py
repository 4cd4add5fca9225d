"""The training step compiled for a slice of chips that is not here."""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.data.tokens import id_dtype
from lit_fast.models.text_tower import TextTower
from lit_fast.runtime import batch_sharding, make_mesh, replicated
from lit_fast.train.step import State, make_step


class Compiled(NamedTuple):
    """What the compiler says of one device's program."""

    argument_bytes: int
    temporary_bytes: int
    collectives: dict[str, int]  # name -> how many stand in the program; one inside a loop counts once
    seconds: float  # that compiling took
    text: str


def tpu_mesh(topology: str) -> Mesh:
    """The mesh of a TPU slice by its description, such as "v4:2x2x1"; needs libtpu but no TPU.

    A v4 chip is two cores that work as one device, which libtpu must be told.

    Raises:
      RuntimeError: libtpu is missing, or knows no such slice.
    """
    # No TPU and no server with its description is looked for, another process may have libtpu open as well, and it
    # does not complain of the missing description.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if topology.endswith(":1x1"):  # a host has four chips otherwise
        options["chips_per_host_bounds"] = (1, 1, 1)
    description = topologies.get_topology_desc(topology, platform="tpu", **options)
    return make_mesh(list(description.devices))


def compile_step(
    model: TextTower, config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, state: State
) -> Compiled:
    """Compile the training step for the mesh's devices, whether they are here or not.

    Args:
      optimizer, state: of `lit_fast.train.step.abstract_training`.
    """
    state = _placed(state, replicated(mesh))
    arrays = _placed(batch_shapes(model, config), batch_sharding(mesh))
    began = time.monotonic()
    compiled = make_step(model, optimizer, config, mesh).lower(state, arrays).compile()
    seconds = time.monotonic() - began
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names},
        seconds,
        text,
    )


def batch_shapes(model: TextTower, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of one global batch as it arrives."""
    batch, text = config.stream.global_batch, config.text
    texts = batch * config.stream.captions_per_image
    ids = jax.ShapeDtypeStruct((texts, model.max_length), id_dtype(model.vocab_size))
    shapes = {
        "images": jax.ShapeDtypeStruct((batch, model.out_dim), jnp.bfloat16),
        "ids": ids,
        "rows": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    if text.packed:  # as lit_fast.train.input_pipeline.packing lays them
        rows = texts // text.pack
        shapes["ids"] = jax.ShapeDtypeStruct((rows, text.row_tokens), ids.dtype)
        shapes["lengths"] = jax.ShapeDtypeStruct((rows, text.pack), jnp.uint16)
        shapes["slots"] = jax.ShapeDtypeStruct((texts,), jnp.int32)
    return shapes


def _placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
