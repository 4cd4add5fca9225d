"""A run: the directory of one training, with its resolved configuration, tower, tokenizer, metrics and checkpoints.

W/config.toml                    resolved configuration
W/tower.json                     provenance of the tower whose features it was trained on; of an image tower that it
                                 trains, with its weights at the start
W/tokenizer.model, tokens.json   the tokenizer and its rules
W/metrics.jsonl, tensorboard/    metrics, see `lit_fast.runs.metrics`
W/receipt.json, report.html      cost and results, written when the training stops
W/checkpoints/<step>/            see `lit_fast.runs.checkpoint`
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lit_fast.config import Config
from lit_fast.config_io import load_config
from lit_fast.data.dataset import Dataset
from lit_fast.data.features import matching_features
from lit_fast.data.tokenizer import Tokenizer, load_recorded_tokenizer
from lit_fast.errors import UserError
from lit_fast.models.image_tower import ImageTower, image_tower
from lit_fast.models.two_towers import (
    Params,
    apply_image_head,
    centered,
    init_params,
    text_embedder,
    text_tower,
)
from lit_fast.runs.checkpoint import restore_params
from lit_fast.runtime import make_mesh, replicated
from lit_fast.storage import paths
from lit_fast.storage.files import exists, is_file
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_object


@dataclass(frozen=True)
class Run:
    """A run with its weights restored, ready to embed texts and features."""

    path: str
    config: Config
    step: int
    params: Params
    tower_json: dict[str, Any]
    tokenizer: Tokenizer
    embedder: Callable[[Params, Sequence[str]], np.ndarray]

    @property
    def name(self) -> str:
        """Name of the directory."""
        return paths.name(paths.absolute(self.path))

    @property
    def tower(self) -> str:
        """Name of the tower it was trained with."""
        return self.tower_json["name"]

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Return normalized embeddings float32 [n, width]."""
        return self.embedder(self.params, texts)

    def image_embeddings(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Return valid rows int64 [n] of an embedded dataset and their normalized embeddings float32 [n, width].

        For runs with a frozen tower; for others see `lit_fast.inference.run_images`.
        """
        assert not self.config.image.trained
        rows, images = image_embeddings(dataset, self.tower_json, np.asarray(self.params["mean"]))
        return rows, apply_image_head(self.params, images)


def image_embeddings(
    dataset: Dataset, tower: dict[str, Any], mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return valid rows int64 [n] and their centred, normalized features float32 [n, width].

    Args:
      dataset: has features of the tower.
      tower: `tower.json` of the run.
      mean: float32 [width], subtracted before normalizing.

    Raises:
      UserError: the dataset has no features of exactly this tower.
    """
    features = matching_features(dataset, tower)
    rows = np.delete(np.arange(dataset.rows), list(features.invalid_rows()))
    return rows, centered(features.read_all()[rows], mean)


def check_run(run: StrPath) -> None:
    """Check that the small files of a run exist.

    Raises:
      UserError: there is no run.
    """
    if not exists(run):
        raise UserError(f"run {run} does not exist; make it with: lit-fast train CONFIG.toml --workdir {run}")
    for name in ("config.toml", "tower.json", "tokens.json", "tokenizer.model"):
        if not is_file(join(run, name)):
            raise UserError(f"{run} is not a run ({name} is missing); make it with: lit-fast train")


def read_config(run: StrPath) -> Config:
    """Read the resolved configuration of a run.

    Raises:
      UserError: it is missing or damaged.
    """
    return load_config(join(run, "config.toml"))


def read_tower(run: StrPath) -> dict[str, Any]:
    """Read the `tower.json` of a run.

    Raises:
      UserError: it is missing or damaged.
    """
    return read_object(
        join(run, "tower.json"), "name", "source", "identity", "width",
        name=str, source=str, identity=str, width=int, views=int, dtype=str, preprocess=dict, options=dict,
    )  # fmt: skip


def read_tokenizer(run: StrPath) -> Tokenizer:
    """Read the tokenizer that a run was trained with.

    Raises:
      UserError: it is missing, damaged or another one.
    """
    tokens = read_object(join(run, "tokens.json"), "identity", "max_length", "pad_id")
    return load_recorded_tokenizer(join(run, "tokenizer.model"), tokens)


def read_image_tower(run: StrPath, config: Config, tower: dict[str, Any]) -> ImageTower:
    """Make the image tower that a run trains from its `tower.json`.

    Raises:
      UserError: it is damaged.
    """
    try:
        return image_tower(tower, config.image)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run}/tower.json is damaged: {type(error).__name__} {error}; restore it") from None


def open_run(run: StrPath, step: int | None = None, average: bool = False) -> Run:
    """Open a run at a step, by default its last checkpoint, with its weights or their moving average.

    Raises:
      UserError: it is not a run, has no such checkpoint, or kept no average.
    """
    check_run(run)
    config = read_config(run)
    if average and not config.optimizer.average_decay:
        raise UserError(
            f"run {run} kept no average of its weights; train with optimizer.average_decay = 0.9999"
        )
    tower, tokenizer = read_tower(run), read_tokenizer(run)
    model = text_tower(config.text, tokenizer, tower["width"])
    image = read_image_tower(run, config, tower) if config.image.trained else None
    mesh = make_mesh(jax.local_devices())
    shapes = jax.eval_shape(lambda: init_params(model, config, np.zeros(tower["width"]), image))
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)), shapes)
    step, params = restore_params(run, step, target, "average" if average else "params")
    return Run(os.fspath(run), config, step, params, tower, tokenizer, text_embedder(model, tokenizer, mesh))
