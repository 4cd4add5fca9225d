"""Open and check the inputs of a run before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import Features, open_features
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.data.tokens import Tokens, open_tokens
from lit_fast.errors import UserError
from lit_fast.runtime import smallest_of_processes
from lit_fast.storage.machine import available_memory
from lit_fast.storage.paths import StrPath
from lit_fast.train.evaluator import Evaluator
from lit_fast.train.input_pipeline.packing import Packing, open_packing
from lit_fast.train.input_pipeline.stream import Stream, open_stream
from lit_fast.train.workdir import check_identity, check_workdir, recorded_in_memory


@dataclass(frozen=True)
class Inputs:
    """The dataset of a run, its order, and the evaluation sets."""

    features: Features
    tokens: Tokens
    tokenizer: Tokenizer
    stream: Stream
    packing: Packing | None
    evaluator: Evaluator

    def mean(self, center: bool) -> np.ndarray:
        """Return the mean of the features, float32 [width]; zero without `center`."""
        features = self.features
        mean = features.mean(features.invalid_rows()) if center else np.zeros(features.width)
        return mean.astype(np.float32)


def open_inputs(config: Config, workdir: StrPath, mesh: Mesh) -> Inputs:
    """Open the dataset, its stream and the evaluation sets.

    Raises:
      UserError: the configuration, the datasets, the devices or the run directory do not match.
    """
    if not config.dataset:
        raise UserError("no dataset is given; add --dataset D, or the key dataset to the config")
    dataset = open_dataset(config.dataset)
    features = open_features(dataset, config.tower)
    tokens = open_tokens(dataset, config.tokenizer)
    tokenizer = tokens.tokenizer()
    check_batch(config, mesh.size)
    check_workdir(workdir, config)
    check_identity(workdir, "tower", features.identity)
    check_identity(workdir, "tokens", tokenizer.identity)
    evaluator = Evaluator(config, features.provenance)
    rank = (jax.process_index(), jax.process_count())
    stream = open_stream(
        features,
        tokens,
        config.stream,
        config.seed,
        rank,
        memory=smallest_of_processes(available_memory()),
        in_memory=recorded_in_memory(workdir),
        center=config.loss.center,
    )
    check_identity(workdir, "stream", stream.identity)
    packing = open_packing(config, tokens, tokenizer.eos_id, mesh) if config.text.packed else None
    return Inputs(features, tokens, tokenizer, stream, packing, evaluator)


def check_run(workdir: StrPath, config: Config, inputs: Inputs) -> None:
    """Raise UserError if the directory holds anything but a run of this configuration and these inputs."""
    check_workdir(workdir, config)
    check_identity(workdir, "tower", inputs.features.identity)
    check_identity(workdir, "tokens", inputs.tokenizer.identity)
    check_identity(workdir, "stream", inputs.stream.identity)


def check_batch(config: Config, devices: int) -> None:
    """Raise UserError if devices and microbatches do not divide the batch."""
    batch, text = config.stream.global_batch, config.text
    if batch % devices:
        raise UserError(f"stream.global_batch {batch} is not divisible by the {devices} devices")
    pairs = batch * config.stream.captions_per_image
    if pairs % (devices * text.microbatches * text.pack):
        pack = f" x text.pack {text.pack}" if text.pack > 1 else ""
        raise UserError(
            f"the {pairs} texts of a batch are not divisible by text.microbatches {text.microbatches}{pack} "
            f"x {devices} devices"
        )
