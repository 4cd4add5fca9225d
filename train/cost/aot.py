"""Compile the training step ahead of time, for devices that may be absent."""

from __future__ import annotations

import math
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.data.tokens import id_dtype
from lit_fast.errors import first_line
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.text_tower import TextTower
from lit_fast.runtime import batch_sharding, make_mesh, replicated
from lit_fast.train.cost.gpu_target import gpu_target
from lit_fast.train.cost.hardware import Chip
from lit_fast.train.step import State, make_step

GPUS_PER_HOST = 8


class CompiledStep(NamedTuple):
    """The compiled program of one device."""

    argument_bytes: int
    temporary_bytes: int
    seconds: float  # compile time
    text: str  # HLO after all optimizations

    @property
    def bytes(self) -> int:
        """Arguments and temporaries."""
        return self.argument_bytes + self.temporary_bytes


def tpu_mesh(topology: str) -> Mesh:
    """Return the mesh of a TPU slice, such as "v4:2x2x1"; needs libtpu but no TPU.

    Raises:
      RuntimeError: libtpu is missing, or refuses the slice.
    """
    # libtpu must not look for a TPU or a metadata server, may be loaded by several processes, writes logs to /tmp, and
    # warns without the last two variables.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_LOG_DIR": "disabled",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    # The two cores of a v4 chip are one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if topology.endswith(":1x1"):  # by default a host has four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    description = topologies.get_topology_desc(topology, platform="tpu", **options)
    return make_mesh(list(description.devices))


def gpu_mesh(chip: Chip, devices: int) -> Mesh:
    """Return a mesh of GPUs that may be absent, on hosts of at most eight; needs a CUDA plugin of JAX.

    Raises:
      RuntimeError: the compiler cannot be used; the text says why.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # by JAX; the plugin reports that it finds no driver
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # The autotuner cannot run without the GPU: a training on one must not find these programs.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()

    hosts = math.ceil(devices / GPUS_PER_HOST)
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=gpu_target(chip), topology=f"1x{hosts}x{devices // hosts}"
        )
        mesh = make_mesh(list(description.devices))
        # A small program shows whether the compiler is complete: it needs libdevice and ptxas.
        shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=replicated(mesh))
        jax.jit(lambda a: jnp.tanh(a) @ a).lower(shape).compile()
    except NotImplementedError as error:
        raise RuntimeError(f"JAX has no CUDA plugin that can be used ({first_line(error)})") from None
    return mesh


def compile_step(
    model: TextTower,
    config: Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: State,
    image: ImageTower | None = None,
) -> CompiledStep:
    """Compile the training step for the devices of a mesh.

    Args:
      optimizer, state: from `lit_fast.train.step.abstract_training`.
      image: the image tower, if it is trained.
    """
    state = _with_sharding(state, replicated(mesh))
    batch = _with_sharding(batch_shapes(model, config, image), batch_sharding(mesh))
    start = time.monotonic()
    compiled = make_step(model, optimizer, config, mesh, image).lower(state, batch).compile()
    seconds = time.monotonic() - start
    memory: Any = compiled.memory_analysis()
    return CompiledStep(
        memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds, compiled.as_text() or ""
    )


def batch_shapes(
    model: TextTower, config: Config, image: ImageTower | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of one global batch, as `make_step` takes it."""
    batch, text = config.stream.global_batch, config.text
    texts = batch * config.stream.captions_per_image
    ids = jax.ShapeDtypeStruct((texts, model.max_length), id_dtype(model.vocab_size))
    shapes = {"ids": ids, "rows": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    if image is None:
        shapes["images"] = jax.ShapeDtypeStruct((batch, model.out_dim), jnp.bfloat16)
    else:
        shapes["pixels"] = jax.ShapeDtypeStruct((batch, image.size, image.size, 3), jnp.uint8)
    if text.packed:  # the layout of lit_fast.train.input_pipeline.packing
        shapes["ids"] = jax.ShapeDtypeStruct((text.rows, text.row_tokens), ids.dtype)
        shapes["lengths"] = jax.ShapeDtypeStruct((text.rows, math.ceil(texts / text.rows)), jnp.uint16)
        shapes["slots"] = jax.ShapeDtypeStruct((texts,), jnp.int32)
    return shapes


def _with_sharding(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)
