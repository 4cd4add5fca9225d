"""What is kept for the backward pass when `text.keep = "auto"`: the fastest way that fits the device's memory.

The candidates are the values of `text.keep` in their order, by how much they work out again. What one needs
is estimated from the shapes of what its backward pass is given; the compiler has the last word.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from lit_fast.config import Config, TextConfig
from lit_fast.errors import UserError
from lit_fast.models.text_tower import TextTower
from lit_fast.models.transformer import REMAT_POLICIES
from lit_fast.models.two_towers import embed_ids
from lit_fast.train.cost.aot import Compiled, batch_shapes, compile_step
from lit_fast.train.step import State

Build = Callable[[TextConfig], TextTower]
"""The text tower of a configuration."""

# Tokens of a part: enough to fill a matrix unit; on a CPU, few enough for its caches.
_TOKENS, _CPU_TOKENS = 8192, {"float32": 768, "bfloat16": 2048}
# The compiler takes a tenth more than the sum of what must be there.
_SLACK = 1.1
# Of a device's memory; the rest is for batches on their way and what the allocator cannot use.
SHARE = 0.93


class Fit(NamedTuple):
    """How a run uses a device's memory."""

    text: TextConfig  # with `keep` and `parts` chosen
    bytes: int  # per device; the compiler's figure if it was asked, else the estimate
    limit: int
    compiled: Compiled | None = None

    @property
    def record(self) -> dict[str, Any]:
        """For the receipt; bytes are of one device."""
        how = "compiler" if self.compiled else "estimate"
        chosen = {"keep": self.text.keep, "parts": self.text.microbatches}
        return chosen | {"bytes": self.bytes, "limit_bytes": self.limit, "bytes_by": how}

    @property
    def description(self) -> str:
        """For the terminal."""
        t = self.text
        by = "by the compiler" if self.compiled else "estimated"
        parts = f", {t.microbatches} microbatches" if t.microbatches > 1 else ""
        return (
            f"keeps {t.keep}{parts}; {self.bytes / 2**30:.2f} of {self.limit / 2**30:.2f} GiB a device, {by}"
        )


def fit(
    config: Config,
    build: Build,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: State,
    limit: int | None = None,
) -> Fit:
    """Choose `text.keep` and `text.microbatches` where they are "auto".

    Args:
      config: of the run; its global batch is divisible by the devices.
      build: the tower of a text configuration.
      mesh: the devices, here or not.
      optimizer, state: of `lit_fast.train.step.abstract_training`.
      limit: bytes of a device; None asks the devices. A CPU's is half of the machine's memory, shared by all
        its devices. On a CPU the estimate is trusted without compiling.

    Raises:
      UserError: not even the leanest way fits.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    limit = limit or device_memory(mesh)
    needs = Needs(config, build, mesh.size, state)
    if config.text.keep != "auto":
        return Fit(config.text, needs.estimate(config.text), limit)
    room, least = SHARE * limit, math.inf
    for text in candidates(config, mesh.size, on_cpu):
        need, made = needs.estimate(text), None
        # The leanest are tried even if the estimate is against it.
        if not on_cpu and (need <= room or text.keep == "embeddings"):
            made = try_compile(config, text, build, mesh, optimizer, state)
            # What the compiler refuses needs more than the device has; how much more it may not say.
            need = made.argument_bytes + made.temporary_bytes if made else max(need, limit)
        if need <= room:
            return Fit(text, int(need), limit, made)
        least = min(least, need)
    raise UserError(
        f"stream.global_batch {config.stream.global_batch} does not fit: it needs at least {least / 2**30:.3g} GiB a "
        f"device, of {room / 2**30:.3g} that a run may take; choose a smaller batch, a smaller tower or more devices"
    )


def device_memory(mesh: Mesh) -> int:
    """Bytes of the smallest device of any process: all must choose alike, as they run one program."""
    # A process may ask its own devices only.
    own = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    own = own or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // len(mesh.local_devices)
    return int(process_allgather(np.int32(own >> 20)).min()) << 20  # JAX has no wider integers


def candidates(config: Config, devices: int, on_cpu: bool) -> Iterator[TextConfig]:
    """Ways to use the memory, from the fastest to the leanest."""
    texts = config.stream.global_batch * config.stream.captions_per_image // devices
    tokens = _CPU_TOKENS[config.text.dtype] if on_cpu else _TOKENS
    # Captions are 16 to 64 tokens; a part of 512 or 32 texts need not be exact.
    rows = texts // config.text.pack
    divisors = [d for d in range(1, math.isqrt(rows) + 1) if rows % d == 0]
    divisors = sorted({*divisors, *(rows // d for d in divisors)})
    parts = next(d for d in divisors if texts // d * 16 <= tokens or d == rows)
    choose = lambda keep, parts: dataclasses.replace(config.text, keep=keep, microbatches=parts)  # noqa: E731
    if not on_cpu:  # whose caches prefer small parts
        yield choose("everything", 1)
    for keep in (*REMAT_POLICIES, "embeddings"):
        # A CPU works queries, keys and values out sooner than it reads them.
        if not (on_cpu and keep == "products"):
            yield choose(keep, parts)
    smaller = [d for d in divisors if d > parts]
    for d in smaller[:: max(1, len(smaller) // 4)]:
        yield choose("embeddings", d)


class Needs:
    """Bytes of a device, from shapes alone."""

    def __init__(self, config: Config, build: Build, devices: int, state: State) -> None:
        self._config, self._build = config, build
        batch = config.stream.global_batch
        self._images = batch // devices
        self._texts = batch * config.stream.captions_per_image // devices
        model = build(config.text)
        self._width = model.out_dim
        self._state = state
        self._arrays = batch_shapes(model, config)
        self._devices = devices
        self._per_text: dict[TextConfig, float] = {}

    @property
    def parameters(self) -> int:
        """In the dtype that they are stored in; an average of them counts as well."""
        return tree_bytes((self._state.params, self._state.average))

    @property
    def optimizer(self) -> int:
        """Its state."""
        return tree_bytes(self._state.opt)

    @property
    def gradients(self) -> int:
        """Of all parameters."""
        return tree_bytes(self._state.params)

    @property
    def batch(self) -> int:
        """A device's part of one batch as it arrives."""
        return tree_bytes(self._arrays) // self._devices

    def kept(self, text: TextConfig) -> int:
        """What the backward pass is given."""
        if text.keep == "embeddings":  # of one part, while it is worked out again
            return int(
                self._texts // text.microbatches * self._given(dataclasses.replace(text, keep="products"))
            )
        return int(self._texts * self._given(text))

    def estimate(self, text: TextConfig) -> int:
        """All of it."""
        working = self._texts // text.microbatches * self._given(dataclasses.replace(text, keep="everything"))
        tile = min(self._config.loss.tile, self._images)
        logits = 4 * tile * min(2 * tile, self._texts) * 4  # of a tile of pairs, and what is made of them
        # Embeddings in float32, of images here and on their way, of texts and their gradients.
        vectors = 8 * self._width * (self._images + self._texts)
        # The gradients, the updates, and the weights in the dtype of the products.
        fixed = tree_bytes(self._state) + self.batch + 3 * self.gradients + logits + vectors
        return int(fixed + _SLACK * (self.kept(text) + working / text.shape.depth))

    def _given(self, text: TextConfig) -> float:
        """Bytes that the backward pass is given for one text."""
        text = dataclasses.replace(text, microbatches=1)
        if text not in self._per_text:
            model = self._build(text)

            def given(rows: int) -> int:
                arrays = {k: self._arrays[k] for k in ("ids", "lengths") if k in self._arrays}
                shapes = {k: jax.ShapeDtypeStruct((rows, a.shape[1]), a.dtype) for k, a in arrays.items()}
                embed = lambda p, a: jax.vjp(lambda p: embed_ids(model, p, **a), p)[1]  # noqa: E731
                return tree_bytes(jax.eval_shape(embed, self._state.params, shapes))

            # Twice, to be rid of the parameters, which it is given as well.
            rows, texts = 8 * text.pack, 8 * text.pack ** (1 + text.packed)
            self._per_text[text] = (given(2 * rows) - given(rows)) / texts
        return self._per_text[text]


def try_compile(
    config: Config,
    text: TextConfig,
    build: Build,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: State,
) -> Compiled | None:
    """The step with this way to keep; None if the compiler finds that it does not fit."""
    try:
        return compile_step(build(text), dataclasses.replace(config, text=text), mesh, optimizer, state)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return None


def tree_bytes(tree: Any) -> int:
    """Of all arrays of a tree, or of their shapes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
