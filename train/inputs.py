"""What a run is trained on: opened and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import Features, open_features
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.data.tokens import Tokens, open_tokens
from lit_fast.errors import UserError
from lit_fast.train.evaluator import Evaluation
from lit_fast.train.input_pipeline.packing import Packing, open_packing
from lit_fast.train.input_pipeline.stream import Stream, open_stream
from lit_fast.train.workdir import check_identity, check_workdir


@dataclass(frozen=True)
class Inputs:
    """Of one run."""

    features: Features
    tokens: Tokens
    tokenizer: Tokenizer
    stream: Stream
    packing: Packing | None
    evaluation: Evaluation

    def mean(self, center: bool) -> np.ndarray:
        """What is subtracted from the features: their mean float32 [width], or zero."""
        features = self.features
        mean = features.mean(features.invalid_rows()) if center else np.zeros(features.width)
        return mean.astype(np.float32)


def open_inputs(config: Config, run: Path, mesh: Mesh) -> Inputs:
    """Open the dataset, its stream and the evaluation sets.

    Raises:
      UserError: the configuration, the datasets, the devices and the run directory do not fit each other.
    """
    if not config.dataset:
        raise UserError("no dataset: give --dataset D, or the key dataset in the config")
    dataset = open_dataset(config.dataset)
    features = open_features(dataset, config.tower)
    tokens = open_tokens(dataset, config.tokenizer)
    tokenizer = tokens.tokenizer()
    check_batch(config, mesh.size)
    check_workdir(run, config)
    check_identity(run, "tower", features.identity)
    check_identity(run, "tokens", tokenizer.identity)
    evaluation = Evaluation(config, features.provenance)
    part = (jax.process_index(), jax.process_count())
    stream = open_stream(features, tokens, config.stream, config.seed, part)
    check_identity(run, "stream", stream.identity)
    packing = open_packing(config, tokens, tokenizer.eos_id, mesh) if config.text.packed else None
    return Inputs(features, tokens, tokenizer, stream, packing, evaluation)


def check_batch(config: Config, devices: int) -> None:
    """Raises UserError where a batch does not divide into equal parts of the devices."""
    batch = config.stream.global_batch
    if batch % devices:
        raise UserError(f"stream.global_batch {batch} is not divisible by the {devices} devices")
    pairs = batch * config.stream.captions_per_image
    text = config.text
    if pairs % (devices * text.microbatches * text.pack):
        pack = f" x text.pack {text.pack}" if text.pack > 1 else ""
        raise UserError(
            f"the {pairs} texts of a batch are not divisible by text.microbatches {text.microbatches}{pack} "
            f"x {devices} devices"
        )
