"""Estimate the memory of a step, and choose the policy of `text.keep = "auto"`.

The estimate sums the shapes of the residuals that the backward pass stores. Where a compiler for the devices exists,
its figure decides; on CPUs the estimate does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lit_fast.config import Config, ImageConfig, TextConfig
from lit_fast.errors import UserError
from lit_fast.models.encoder_pass import KEPT
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.precision import resolve_dtype
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import image_tower_params
from lit_fast.runtime import platform_of, smallest_of_processes
from lit_fast.storage.machine import available_memory
from lit_fast.train.cost.aot import CompiledStep, batch_shapes, compile_step
from lit_fast.train.image_pass import trainable
from lit_fast.train.sizes import SIZES, with_tile
from lit_fast.train.step import State
from lit_fast.train.text_pass import TextPass

BuildTower = Callable[[TextConfig], TextTower]

USABLE_SHARE = 0.93  # of device memory; the rest is for batches in transfer and fragmentation
_RESIDUALS_FACTOR = 1.1  # compiled steps need 10 % more memory than the sum of their residuals
_LAYER_FACTOR = 3  # of the matrix products of a layer and microbatch: what exists while it is computed


class MemoryFit(NamedTuple):
    """The remat policy of a run and the device memory that a step needs with it."""

    text: TextConfig  # with `keep` and `microbatches` chosen
    bytes: int  # per device; from the compiler where it was used, otherwise the estimate
    limit: int  # of a device
    compiled: CompiledStep | None = None
    image: ImageConfig = ImageConfig()  # as `text`, for a trained image tower

    @property
    def record(self) -> dict[str, Any]:
        """The entry of the receipt; bytes are per device."""
        return {
            "keep": self.text.keep,
            "parts": self.text.microbatches,
            "bytes": self.bytes,
            "limit_bytes": self.limit,
            "bytes_by": "compiler" if self.compiled else "estimate",
        } | self._image_record

    @property
    def _image_record(self) -> dict[str, Any]:
        if not self.image.trained:
            return {}
        return {"image_keep": self.image.keep, "image_parts": self.image.microbatches}

    @property
    def description(self) -> str:
        """A line for the terminal."""
        count = self.text.microbatches
        microbatches = f", {count} microbatches" if count > 1 else ""
        if self.image.trained:
            count = self.image.microbatches
            microbatches += f"; image.keep {self.image.keep}" + f", {count} microbatches" * (count > 1)
        source = "compiler" if self.compiled else "estimate"
        return (
            f"text.keep {self.text.keep}{microbatches}; {self.bytes / 2**30:.2f} of {self.limit / 2**30:.2f} GiB "
            f"per device ({source})"
        )


def choose_remat(
    config: Config,
    build: BuildTower,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: State,
    limit: int | None = None,
    image: ImageTower | None = None,
) -> MemoryFit:
    """Choose `text.keep` and `text.microbatches` for `text.keep = "auto"`, and those of a trained image tower.

    The choice is the first policy, in order of increasing recomputation, whose step fits in device memory.

    Args:
      config: of the run; its global batch is divisible by the number of devices.
      build: the constructor of the text tower.
      mesh: the devices; they may be absent.
      optimizer, state: from `lit_fast.train.step.abstract_training`.
      limit: bytes per device; None: as the devices report. On CPUs, half of the machine's or container's memory is
        shared by the devices, and nothing is compiled.
      image: the image tower, if it is trained.

    Raises:
      UserError: no policy fits.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    limit = limit or device_memory(mesh)
    estimate = MemoryEstimate(config, build, mesh.size, state, platform_of(mesh), image)
    if config.text.keep != "auto" and (image is None or config.image.keep != "auto"):
        need = estimate.total(config.text, config.image)
        return MemoryFit(config.text, need, limit, image=config.image)
    usable, least = USABLE_SHARE * limit, math.inf
    for text, image_config in _candidates(config, mesh.size, platform_of(mesh), image):
        need, compiled = estimate.total(text, image_config), None
        # The policies with the least memory are compiled even if the estimate exceeds the limit.
        if not on_cpu and (need <= usable or "embeddings" in (text.keep, image_config.keep)):
            candidate = dataclasses.replace(config, image=image_config)
            compiled = try_compile(candidate, text, build, mesh, optimizer, state, image)
            need = compiled.bytes if compiled else max(need, limit)  # the compiler may not report the excess
        if need <= usable:
            return MemoryFit(text, int(need), limit, compiled, image_config)
        least = min(least, need)
    raise UserError(
        f"stream.global_batch {config.stream.global_batch} does not fit: a step needs at least {least / 2**30:.3g} "
        f"GiB per device, of {usable / 2**30:.3g} usable; choose a smaller batch, a smaller tower or more devices"
    )


def _candidates(
    config: Config, num_devices: int, platform: str, image: ImageTower | None
) -> Iterator[tuple[TextConfig, ImageConfig]]:
    """Yield configurations of both towers in order of increasing recomputation."""
    texts, images = [config.text], [config.image]
    if config.text.keep == "auto":
        texts = list(remat_candidates(config, num_devices, platform))
    if image is not None and config.image.keep == "auto":
        images = list(image_candidates(config, num_devices, platform, image))
    count = max(len(texts), len(images))
    for i in range(count):
        yield texts[i * len(texts) // count], images[i * len(images) // count]


def image_candidates(
    config: Config, num_devices: int, platform: str, image: ImageTower
) -> Iterator[ImageConfig]:
    """Yield image configurations in the order of `remat_candidates`."""
    sizes, images = SIZES[platform], config.stream.global_batch // num_devices
    length = (image.size // image.architecture.patch) ** 2
    divisors = [d for d in range(1, images + 1) if images % d == 0]

    def smallest(tokens: int) -> int:
        """Return the index of the number of microbatches that have at most so many tokens."""
        return next(i for i, d in enumerate(divisors) if images // d * length <= tokens or d == images)

    first = smallest(sizes.most_tokens[resolve_dtype(config.image.dtype, platform)])
    last = max(first, smallest(sizes.least_tokens))
    for keep in KEPT:
        for microbatches in divisors[first : last + 1]:
            yield dataclasses.replace(config.image, keep=keep, microbatches=microbatches)
    smaller = divisors[last:]
    for microbatches in smaller[:: max(1, len(smaller) // 4)]:
        yield dataclasses.replace(config.image, keep="embeddings", microbatches=microbatches)


def device_memory(mesh: Mesh) -> int:
    """Return the bytes of the smallest device of all processes."""
    # All processes must choose the same program, and a process can query its own devices only.
    own = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    return smallest_of_processes(own or available_memory() // 2 // len(mesh.local_devices))


def remat_candidates(config: Config, num_devices: int, platform: str) -> Iterator[TextConfig]:
    """Yield text configurations in order of increasing recomputation, and of decreasing size of a microbatch."""
    sizes, text = SIZES[platform], config.text
    texts = config.stream.global_batch * config.stream.captions_per_image // num_devices
    # Captions have 16 to 64 tokens; the size of a microbatch need not be exact.
    rows, row_tokens = texts // text.pack, text.pack * 16
    if text.packed:
        rows, row_tokens = text.rows // num_devices, text.row_tokens
    divisors = [d for d in range(1, math.isqrt(rows) + 1) if rows % d == 0]
    divisors = sorted({*divisors, *(rows // d for d in divisors)})

    def smallest(tokens: int) -> int:
        """Return the index of the number of microbatches that have at most so many tokens."""
        return next(i for i, d in enumerate(divisors) if rows // d * row_tokens <= tokens or d == rows)

    first = smallest(sizes.most_tokens[resolve_dtype(text.dtype, platform)])
    last = max(first, smallest(sizes.least_tokens))
    for keep in KEPT:
        for microbatches in divisors[first : last + 1]:
            yield dataclasses.replace(text, keep=keep, microbatches=microbatches)
    smaller = divisors[last:]
    for microbatches in smaller[:: max(1, len(smaller) // 4)]:
        yield dataclasses.replace(text, keep="embeddings", microbatches=microbatches)


class MemoryEstimate:
    """Bytes per device of a training step, from shapes alone."""

    def __init__(
        self,
        config: Config,
        build: BuildTower,
        num_devices: int,
        state: State,
        platform: str,
        image: ImageTower | None = None,
    ) -> None:
        model = build(config.text)
        self._platform, config = platform, with_tile(config, platform)
        self._build, self._state, self._batch = build, state, batch_shapes(model, config, image)
        self._image, self._per_image = image, dict[str, float]()
        self._images = config.stream.global_batch // num_devices
        self._texts = self._images * config.stream.captions_per_image
        self._texts_per_row = self._texts * num_devices / self._batch["ids"].shape[0]
        self._width, self._tile = model.out_dim, config.loss.tile
        self._per_text: dict[TextConfig, float] = {}
        self.parameters = _tree_bytes((state.params, state.average))
        self.optimizer = _tree_bytes(state.opt)
        self.gradients = _tree_bytes(state.params)
        self.batch = _tree_bytes(self._batch) // num_devices  # a device's shard

    def residuals(self, text: TextConfig) -> int:
        """Return the bytes of the residuals that are stored for the backward pass."""
        if text.keep == "embeddings":  # of one microbatch, while it is recomputed
            products = dataclasses.replace(text, keep="products")
            return int(self._texts // text.microbatches * self._residuals_per_text(products))
        return int(self._texts * self._residuals_per_text(text))

    def image_residuals(self, image: ImageConfig) -> int:
        """Return the bytes of the residuals of a trained image tower; 0 without one."""
        kept = self._images // image.microbatches if image.keep == "embeddings" else self._images
        return int(kept * self._residuals_per_image(image.keep)) if self._image else 0

    def total(self, text: TextConfig, image: ImageConfig = ImageConfig()) -> int:  # noqa: B008
        """Return the bytes of arguments and temporaries."""
        products = dataclasses.replace(text, keep="products")
        microbatch = self._texts // text.microbatches * self._residuals_per_text(products)
        tile = min(self._tile, self._images)
        # Four float32 arrays of the shape of a tile of pairs.
        logits = 4 * 4 * tile * min(2 * tile, self._texts)
        # In float32: images here and in transfer, texts and their gradients.
        embeddings = 8 * self._width * (self._images + self._texts)
        # Gradients, updates (on CPUs the parameters before a logged step), and weights in the dtype of the products.
        fixed = _tree_bytes(self._state) + self.batch + 3 * self.gradients + logits + embeddings
        total = fixed + _RESIDUALS_FACTOR * (
            self.residuals(text) + _LAYER_FACTOR * microbatch / text.shape.depth
        )
        if self._image is not None:
            layers = self._image.architecture.shape.depth
            layer = self._images // image.microbatches * self._residuals_per_image("products") / layers
            total += _RESIDUALS_FACTOR * (self.image_residuals(image) + _LAYER_FACTOR * layer)
            if self._platform == "tpu":  # the pixels in the layout of the convolution, with four channels
                total += 4 * self._images * self._image.size**2
        return int(total)

    def _residuals_per_image(self, keep: str) -> float:
        if keep not in self._per_image:
            assert self._image is not None
            tower = trainable(self._image, keep, self._platform)
            params = image_tower_params(self._state.params)

            def residuals(images: int) -> int:
                pixels = jax.ShapeDtypeStruct((images, tower.size, tower.size, 3), jnp.uint8)
                backward = lambda p, x: jax.vjp(lambda p: tower.features(p, x), p)[1]  # noqa: E731
                return _tree_bytes(jax.eval_shape(backward, params, pixels))

            self._per_image[keep] = float(residuals(2) - residuals(1))
        return self._per_image[keep]

    def _residuals_per_text(self, text: TextConfig) -> float:
        text = dataclasses.replace(text, microbatches=1)
        if text not in self._per_text:
            embed = TextPass(self._build(text), text.keep, 1, self._platform)

            def residuals(rows: int) -> int:
                arrays = {k: a for k, a in self._batch.items() if k in ("ids", "lengths")}
                shapes = {k: jax.ShapeDtypeStruct((rows, a.shape[1]), a.dtype) for k, a in arrays.items()}
                backward = lambda p, a: jax.vjp(lambda p: embed(p, a), p)[1]  # noqa: E731
                return _tree_bytes(jax.eval_shape(backward, self._state.params["txt"], shapes))

            # The difference of two sizes removes the parameters, which are residuals too.
            rows = 8 * text.pack
            self._per_text[text] = (residuals(2 * rows) - residuals(rows)) / (rows * self._texts_per_row)
        return self._per_text[text]


def try_compile(
    config: Config,
    text: TextConfig,
    build: BuildTower,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    state: State,
    image: ImageTower | None = None,
) -> CompiledStep | None:
    """Compile the step with a remat policy; None if it exceeds device memory."""
    try:
        return compile_step(
            build(text), dataclasses.replace(config, text=text), mesh, optimizer, state, image
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return None


def _tree_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree, or of their shapes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
