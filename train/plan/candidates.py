"""Candidates of a plan: remat policy, microbatches and packing."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple, cast

import jax

from lit_fast.config import Config, ImageConfig, TextConfig
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError, first_line
from lit_fast.models.precision import resolve_dtype
from lit_fast.models.two_towers import text_tower
from lit_fast.runtime import make_mesh
from lit_fast.train.cost.aot import CompiledStep, batch_shapes
from lit_fast.train.cost.flops import program_flops
from lit_fast.train.cost.hlo import Collective, ProgramCost, program_cost
from lit_fast.train.cost.kernels import attention_cycles
from lit_fast.train.cost.memory import (
    USABLE_SHARE,
    BuildTower,
    MemoryEstimate,
    choose_remat,
    image_candidates,
    remat_candidates,
    try_compile,
)
from lit_fast.train.input_pipeline.packing import with_rows
from lit_fast.train.inputs import check_batch
from lit_fast.train.plan.data import PlanData, plan_data
from lit_fast.train.plan.image import plan_image_tower
from lit_fast.train.plan.target import Target
from lit_fast.train.step import abstract_training, make_step
from lit_fast.train.text_pass import kernel_refusal
from lit_fast.utils.output import status
from lit_fast.utils.progress import report_elapsed

_COMPILE_TIME = {
    "tpu": "half a minute to 2 minutes",
    "gpu": "half a minute",
}  # of the packaged recipes on two idle cores
KERNEL_SECONDS = 2e-6  # to start a kernel on a GPU and to end it: an assumption, not measured here


class Candidate(NamedTuple):
    """A configuration of the towers and its cost; bytes and FLOPs are per device and step."""

    text: TextConfig
    image: ImageConfig
    bytes: int
    fits: bool
    flops: float  # executed, with recomputation
    compiler_seconds: float | None  # the compiler's estimate of a step; None: it gives none
    collectives: dict[str, Collective]
    compiled: CompiledStep | None
    program: ProgramCost | None  # of the compiled step

    @property
    def kernels(self) -> float | None:
        """Kernels per step; None: the step was not compiled."""
        return self.program.kernels if self.program else None


class Planner:
    """Evaluates candidates for one configuration and target."""

    def __init__(self, config: Config, target: Target) -> None:
        check_batch(config, target.devices)
        self.target = target
        text = dataclasses.replace(config.text, dtype=resolve_dtype(config.text.dtype, target.platform))
        image_dtype = text.dtype if config.image.dtype == "auto" else config.image.dtype
        config = dataclasses.replace(config, image=dataclasses.replace(config.image, dtype=image_dtype))
        self.image = plan_image_tower(config)
        self.data: PlanData = plan_data(config, self.image)
        self.texts = config.stream.global_batch * config.stream.captions_per_image // target.devices
        tokenizer = cast(Tokenizer, self.data.vocabulary)  # the tower reads nothing but its sizes
        self.build: BuildTower = partial(text_tower, tokenizer=tokenizer, out_dim=self.data.width)
        self._attention = text.attention
        self.config = dataclasses.replace(config, text=self.with_packing(text, text.pack))
        self._optimizer, self._state = abstract_training(
            self.build(self.config.text), self.config, self.image
        )
        self.usable_memory = USABLE_SHARE * target.chip.memory
        self.compiles = 0
        self._estimates: dict[tuple[int, int, int], MemoryEstimate] = {}
        self._flops: dict[TextConfig, tuple[float, float]] = {}

    def with_packing(self, text: TextConfig, pack: int) -> TextConfig:
        """Return the configuration with `pack` captions per row, the rows they require, and their attention.

        With `text.attention = "auto"` it is what a training on a TPU compares first: the kernels, if they fit.
        """
        if pack != text.pack:
            text = dataclasses.replace(text, pack=pack, row_tokens=0, rows=0)
        if text.packed:
            length = self.data.vocabulary.max_length
            text = with_rows(text, self.data.lengths, self.texts, length, self.target.devices)
        form = self._attention
        if form == "auto":
            refusal = kernel_refusal(self.build(text), text.row_tokens)
            form = "pallas" if self.target.platform == "tpu" and not refusal else "xla"
        return dataclasses.replace(text, attention=form)

    def memory(self, text: TextConfig) -> MemoryEstimate:
        """Return the memory estimate for the packing of a text configuration."""
        packing = text.pack, text.row_tokens, text.rows
        if packing not in self._estimates:
            config = dataclasses.replace(self.config, text=text)
            self._estimates[packing] = MemoryEstimate(
                config, self.build, self.target.devices, self._state, self.target.platform, self.image
            )
        return self._estimates[packing]

    def image_of(self, text: TextConfig) -> ImageConfig:
        """Return the image configuration that a candidate of the text tower has beside it."""
        config = self.config
        if self.image is None or config.image.keep != "auto":
            return config.image
        devices, platform = self.target.devices, self.target.platform
        auto = dataclasses.replace(config, text=dataclasses.replace(text, keep="auto", microbatches=1))
        counts = [t.microbatches for t in remat_candidates(auto, devices, platform) if t.keep == text.keep]
        images = [i for i in image_candidates(auto, devices, platform, self.image) if i.keep == text.keep]
        smaller = sum(count < text.microbatches for count in counts)
        return images[min(smaller, len(images) - 1)]

    def estimated_bytes(self, text: TextConfig) -> int:
        """Return the estimated memory of a step."""
        return self.memory(text).total(text, self.image_of(text))

    def default(self) -> Candidate:
        """Evaluate the candidate that a training with this configuration uses.

        Raises:
          UserError: no candidate fits.
        """
        text, mesh, chip = self.config.text, self.target.mesh, self.target.chip
        if text.keep != "auto" and (self.image is None or self.config.image.keep != "auto"):
            return self.evaluate(text)
        if mesh is not None:
            label = f"compiling for {self.target.name}"
            if self.target.platform in _COMPILE_TIME:
                status(f"{label}: {_COMPILE_TIME[self.target.platform]} on two idle cores")
            with report_elapsed(label):
                fit = choose_remat(
                    self.config,
                    self.build,
                    mesh,
                    self._optimizer,
                    self._state,
                    int(chip.memory),
                    image=self.image,
                )
            self.compiles += 1
            if fit.compiled:
                return self._candidate(fit.text, fit.compiled, fit.image)
            return self.evaluate(fit.text, fit.image)
        texts = iter([text])
        if text.keep == "auto":
            texts = remat_candidates(self.config, self.target.devices, self.target.platform)
        need = 0
        for candidate in texts:
            need = self.estimated_bytes(candidate)
            if need <= self.usable_memory:
                return self.evaluate(candidate)
        raise UserError(
            f"stream.global_batch {self.config.stream.global_batch} does not fit: a step needs an estimated "
            f"{need / 2**30:.3g} GiB per device, of {self.usable_memory / 2**30:.3g} usable; "
            "choose a smaller batch, a smaller tower or more devices"
        )

    def evaluate(self, text: TextConfig, image: ImageConfig | None = None) -> Candidate:
        """Return the cost of a configuration, from the compiler if the target has one.

        Args:
          image: of the image tower; None: that of `image_of`.

        Raises:
          UserError: the compiler fails, but not for lack of memory.
        """
        image = image or self.image_of(text)
        if self.target.mesh is None:
            return self._candidate(text, None, image)
        self.compiles += 1
        mesh, optimizer, state = self.target.mesh, self._optimizer, self._state
        config = dataclasses.replace(self.config, image=image)
        what = f"{self.target.name}, {describe(text, image)}"
        try:
            with report_elapsed(f"compiling for {what}"):
                compiled = try_compile(config, text, self.build, mesh, optimizer, state, self.image)
        except jax.errors.JaxRuntimeError as error:
            action = 'set text.attention = "xla"' if text.attention == "pallas" else "plan another candidate"
            raise UserError(f"the compiler fails for {what}: {first_line(error)}; {action}") from None
        return self._candidate(text, compiled, image)

    def _candidate(self, text: TextConfig, compiled: CompiledStep | None, image: ImageConfig) -> Candidate:
        flops, usable = self.executed_flops(text), self.usable_memory
        if compiled is None:
            need = self.memory(text).total(text, image)
            if self.target.mesh is not None:  # the compiler refused it
                need = max(need, int(self.target.chip.memory))
            return Candidate(
                text, image, need, need <= usable, flops, None, self._estimated_collectives(), None, None
            )
        chip, clock = self.target.chip.name, self.target.chip.clock
        cost = program_cost(compiled.text, partial(attention_cycles, chip))
        if cost.unknown_loops:
            status(f"{cost.unknown_loops} loops of unknown length count once: times and bytes are too low")
        seconds = cost.cycles / clock if clock else None
        # On one device, collectives are local copies.
        collectives = cost.collectives if self.target.devices > 1 else {}
        return Candidate(
            text, image, compiled.bytes, compiled.bytes <= usable, flops, seconds, collectives, compiled, cost
        )

    def executed_flops(self, text: TextConfig) -> float:
        """Return the FLOPs of matrix products in the traced step, per device."""
        return self._products(text)[0]

    def product_seconds(self, text: TextConfig) -> float:
        """Return the seconds of the matrix products at the peak of the units that compute them."""
        return self._products(text)[1] / self.target.chip.flops

    def _products(self, text: TextConfig) -> tuple[float, float]:
        """Return the FLOPs of the products, and FLOPs of bfloat16 products that take the same time, per device."""
        key = dataclasses.replace(text, microbatches=1)
        if key not in self._flops:
            image = dataclasses.replace(self.image_of(text), microbatches=1)
            config, model = dataclasses.replace(self.config, text=key, image=image), self.build(key)
            # Traced for a single device: it computes the products of all devices.
            step = make_step(model, self._optimizer, config, make_mesh(jax.devices("cpu")[:1]), self.image)
            program = jax.make_jaxpr(step)(self._state, batch_shapes(model, config, self.image)).jaxpr
            flops, weighted = program_flops(program), program_flops(program, self.target.chip.passes)
            self._flops[key] = flops / self.target.devices, weighted / self.target.devices
        return self._flops[key]

    def _estimated_collectives(self) -> dict[str, Collective]:
        """Sum of the gradients, and ring rotation of image embeddings and row numbers."""
        devices = self.target.devices
        if devices == 1:
            return {}
        images = self.config.stream.global_batch // devices
        return {
            "all-reduce": Collective(1, self.memory(self.config.text).gradients),
            "collective-permute": Collective(2 * devices, devices * images * 4 * (self.data.width + 1)),
        }

    def kernel_seconds(self, candidate: Candidate) -> float:
        """Return the seconds to start the kernels of a step on a GPU; 0 elsewhere, and where it was not compiled."""
        return KERNEL_SECONDS * (candidate.kernels or 0) if self.target.platform == "gpu" else 0.0

    def relative_seconds(self, candidate: Candidate) -> float:
        """Return a time that ranks candidates: the compiler's, else that of products and of starting kernels."""
        if candidate.compiler_seconds is not None:
            return candidate.compiler_seconds
        return self.product_seconds(candidate.text) + self.kernel_seconds(candidate)


def describe(text: TextConfig, image: ImageConfig) -> str:
    """Return for example `hidden, 16 microbatches`, and the same of a trained image tower."""
    rows = f", {text.pack} captions per row" if text.pack > 1 else ""
    if text.packed:
        rows = f", {text.rows:,} rows of {text.row_tokens} tokens"
    found = f"{text.keep}, {_microbatches(text.microbatches)}{rows}"
    return found + (f"; images {image.keep}, {_microbatches(image.microbatches)}" if image.trained else "")


def _microbatches(count: int) -> str:
    return f"{count} microbatch{'es' * (count > 1)}"


def overrides(text: TextConfig, image: ImageConfig) -> str:
    """Return the flags that select a configuration in `lit-fast train`."""
    flags = f"--text.keep {text.keep} --text.microbatches {text.microbatches} --text.pack {text.pack}"
    return flags + (
        f" --image.keep {image.keep} --image.microbatches {image.microbatches}" if image.trained else ""
    )
