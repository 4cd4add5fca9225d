"""Open and check the inputs of a run before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import Features, open_features
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.data.tokens import Tokens, open_tokens
from lit_fast.errors import UserError
from lit_fast.runtime import smallest_of_processes
from lit_fast.storage.machine import available_memory
from lit_fast.storage.paths import StrPath
from lit_fast.train.evaluator import Evaluator
from lit_fast.train.image_start import ImageStart, open_image_start
from lit_fast.train.input_pipeline.images import Images, check_image_sources
from lit_fast.train.input_pipeline.packing import Packing, open_packing
from lit_fast.train.input_pipeline.stream import Stream, open_stream
from lit_fast.train.workdir import check_identity, check_workdir, recorded_in_memory


@dataclass(frozen=True)
class Inputs:
    """The dataset of a run, its order, and the evaluation sets.

    Attributes:
      features: of a frozen tower; None if it is trained.
      image: the image tower, if it is trained.
      tower_json: provenance of the tower.
    """

    dataset: Dataset
    features: Features | None
    image: ImageStart | None
    tower_json: dict[str, Any]
    tokens: Tokens
    tokenizer: Tokenizer
    stream: Stream
    packing: Packing | None
    evaluator: Evaluator

    @property
    def width(self) -> int:
        """Length of an image feature."""
        return int(self.tower_json["width"])

    def mean(self, center: bool) -> np.ndarray:
        """Return the mean of stored features, float32 [width]; zero without `center` and without features."""
        features = self.features
        if not center or features is None:
            return np.zeros(self.width, np.float32)
        return features.mean(features.invalid_rows()).astype(np.float32)


def open_inputs(config: Config, workdir: StrPath, mesh: Mesh) -> Inputs:
    """Open the dataset, its stream and the evaluation sets.

    Raises:
      UserError: the configuration, the datasets, the devices or the run directory do not match.
    """
    if not config.dataset:
        raise UserError("no dataset is given; add --dataset D, or the key dataset to the config")
    dataset = open_dataset(config.dataset)
    tokens = open_tokens(dataset, config.tokenizer)
    tokenizer = tokens.tokenizer()
    check_batch(config, mesh.size)
    check_workdir(workdir, config)
    features, image = None, None
    images: Features | Images
    if config.image.trained:
        check_image_sources(dataset)
        image = open_image_start(config, dataset)
        tower_json = image.record
        options = config.image
        images = Images(
            dataset, image.preprocess, options.crop, options.flip, image.features, options.workers
        )
    else:
        images = features = open_features(dataset, config.tower)
        tower_json = features.provenance
    check_identity(workdir, "tower", tower_json["identity"])
    check_identity(workdir, "tokens", tokenizer.identity)
    evaluator = Evaluator(config, None if image else tower_json)
    rank = (jax.process_index(), jax.process_count())
    stream = open_stream(
        images,
        tokens,
        config.stream,
        config.seed,
        rank,
        memory=smallest_of_processes(available_memory()),
        in_memory=recorded_in_memory(workdir),
        center=config.loss.center,
    )
    check_identity(workdir, "stream", stream.identity)
    packing = open_packing(config, tokens, tokenizer, mesh) if config.text.packed else None
    return Inputs(dataset, features, image, tower_json, tokens, tokenizer, stream, packing, evaluator)


def check_run(workdir: StrPath, config: Config, inputs: Inputs) -> None:
    """Raise UserError if the directory holds anything but a run of this configuration and these inputs."""
    check_workdir(workdir, config)
    check_identity(workdir, "tower", inputs.tower_json["identity"])
    check_identity(workdir, "tokens", inputs.tokenizer.identity)
    check_identity(workdir, "stream", inputs.stream.identity)


def check_batch(config: Config, devices: int) -> None:
    """Raise UserError if devices and microbatches do not divide the batch."""
    batch, text, image = config.stream.global_batch, config.text, config.image
    if batch % devices:
        raise UserError(
            f"stream.global_batch {batch} is not divisible by the {devices} devices; use a multiple"
        )
    if batch % (devices * image.microbatches):
        raise UserError(
            f"stream.global_batch {batch} is not divisible by image.microbatches {image.microbatches} x {devices} "
            "devices; use a multiple"
        )
    if text.packed:
        if text.rows % (devices * text.microbatches):
            raise UserError(
                f"text.rows {text.rows} is not divisible by text.microbatches {text.microbatches} x {devices} "
                "devices; use a multiple"
            )
        return
    pairs = batch * config.stream.captions_per_image
    if pairs % (devices * text.microbatches * text.pack):
        pack = f" x text.pack {text.pack}" if text.pack > 1 else ""
        raise UserError(
            f"the {pairs} texts of a batch are not divisible by text.microbatches {text.microbatches}{pack} "
            f"x {devices} devices; change stream.global_batch"
        )
