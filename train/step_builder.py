"""Choose remat policy and attention for the devices of a run, and build its model and training step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import text_tower
from lit_fast.storage.paths import StrPath
from lit_fast.train.attention import compare_attention, compile_kernels, propose_attention, with_kernels
from lit_fast.train.cost.memory import MemoryFit, choose_remat
from lit_fast.train.inputs import Inputs
from lit_fast.train.step import State, abstract_training, make_step
from lit_fast.train.text_pass import DeviceBatch
from lit_fast.utils.output import status


class StepBuilder:
    """Builds the model, the optimizer and the training step of a run.

    Attributes:
      image: the image tower, if it is trained.
      optimizer: of all trained parameters.
      attention: the form of attention.
      memory: the remat policy that fits in device memory with this form.
    """

    def __init__(self, config: Config, inputs: Inputs, mesh: Mesh, workdir: StrPath) -> None:
        """Choose the attention and the remat policy, before anything has run on the devices.

        Raises:
          UserError: no policy fits, or `text.attention` or a rule of the optimizer is impossible.
        """
        self._config, self._mesh = config, mesh
        self._text = inputs.packing.text if inputs.packing else config.text
        self._build = partial(text_tower, tokenizer=inputs.tokenizer, out_dim=inputs.width)
        self.image = inputs.image.tower(config.image) if inputs.image else None
        proposed = propose_attention(self._text, self._build(self._text), mesh, workdir)
        proposed = compile_kernels(proposed, self._text, self._build(self._text), mesh)
        self.optimizer, self._abstract_state = abstract_training(self._build(self._text), config, self.image)
        fit = partial(self._fit, proposed.form)
        self.attention, memory = with_kernels(proposed, config.text.attention, fit)
        self.memory = memory or self._fit("xla")
        status(f"memory: {self.memory.description}")

    @property
    def model(self) -> TextTower:
        """The text tower."""
        return self._build(self.memory.text)

    def make_step(self) -> jax.stages.Wrapped:
        """Return the training step with the chosen attention and remat policy."""
        config = replace(self._config, text=self.memory.text, image=self.memory.image)
        return make_step(self.model, self.optimizer, config, self._mesh, self.image)

    def with_checked_kernels(
        self, step: jax.stages.Wrapped, state: State, batch: DeviceBatch
    ) -> jax.stages.Wrapped:
        """Compare the attention kernels of `step` with XLA's form, compile it, and return the step to train with.

        The forms are compared if no earlier part of the run has shown that they agree on these devices.

        Args:
          step: from `make_step`, with the kernels.
          state: before the first batch.
          batch: the global batch, on the devices.

        Returns:
          `step`; one with XLA's attention, and its remat policy, if the kernels differ or do not compile.

        Raises:
          UserError: the step does not compile with the kernels, and `text.attention` is "pallas"; or no policy fits
            with XLA's attention.
        """
        config = replace(self._config, image=self.memory.image)
        self.attention = compare_attention(
            self.attention, config, self.memory.text, self._build, self._mesh, state, batch, self.image
        )
        if self.attention.form == "pallas":
            requested = self._config.text.attention
            self.attention, _ = with_kernels(
                self.attention, requested, lambda: step.lower(state, batch).compile()
            )
        if self.attention.form == "pallas":
            return step
        self.memory = self._fit("xla")
        status(f"memory: {self.memory.description}")
        return self.make_step()

    def _fit(self, attention: str) -> MemoryFit:
        config = replace(self._config, text=replace(self._text, attention=attention))
        return choose_remat(
            config, self._build, self._mesh, self.optimizer, self._abstract_state, image=self.image
        )
