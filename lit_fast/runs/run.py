"""A run: a directory with one training's resolved config, tower, tokenizer, metrics and checkpoints.

W/config.toml                    resolved
W/tower.json                     provenance of the tower it was trained with
W/tokenizer.model, tokens.json   the tokenizer and its rules
W/metrics.jsonl, tensorboard/    what happened, see `lit_fast.runs.metrics`
W/receipt.json, report.html      what it took and what came out, written when it stops
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
from lit_fast.data.tokenizer import Tokenizer, load_tokenizer
from lit_fast.errors import UserError
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
from lit_fast.storage.files import exists, is_file, read_object
from lit_fast.storage.paths import StrPath, absolute, join
from lit_fast.storage.paths import name as last_part


def image_embeddings(
    dataset: Dataset, tower: dict[str, Any], mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Valid rows int64 [n] and their embeddings float32 [n, width]: centred and normalised features.

    Args:
      dataset: with features of the tower.
      tower: `tower.json` of the run; a store made by anything else is refused.
      mean: float32 [width].
    """
    features = matching_features(dataset, tower)
    rows = np.setdiff1d(np.arange(dataset.rows), np.array(sorted(features.invalid_rows()), np.int64))
    return rows, centered(features.read_all()[rows], mean)


def read_tower(run: StrPath) -> dict[str, Any]:
    """The run's `tower.json`.

    Raises:
      UserError: it is missing or damaged.
    """
    return read_object(
        join(run, "tower.json"), "name", "source", "identity", "width",
        name=str, source=str, identity=str, width=int, views=int, dtype=str, preprocess=dict, options=dict,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """An opened run, ready to embed."""

    path: str
    config: Config
    step: int
    params: Params
    tower_json: dict[str, Any]
    tokenizer: Tokenizer
    embedder: Callable[[Params, Sequence[str]], np.ndarray]

    @property
    def name(self) -> str:
        """The directory's name."""
        return last_part(absolute(self.path))

    @property
    def tower(self) -> str:
        """Name of the tower it was trained with."""
        return self.tower_json["name"]

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Normalised float32 [n, width]."""
        return self.embedder(self.params, texts)

    def image_embeddings(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Valid rows int64 [n] and normalised embeddings float32 [n, width] of an embedded dataset."""
        rows, images = image_embeddings(dataset, self.tower_json, np.asarray(self.params["mean"]))
        return rows, apply_image_head(self.params, images)


def check_run(path: StrPath) -> None:
    """Raises UserError where there is no run; reads nothing big."""
    if not exists(path):
        raise UserError(
            f"run {path} does not exist; make it with: lit-fast train CONFIG.toml --workdir {path}"
        )
    for name in ("config.toml", "tower.json", "tokens.json", "tokenizer.model"):
        if not is_file(join(path, name)):
            raise UserError(f"{path} is not a run ({name} is missing); make it with: lit-fast train")


def read_config(run: StrPath) -> Config:
    """Read the resolved configuration of a run.

    Raises:
      UserError: it is missing or damaged.
    """
    return load_config(join(run, "config.toml"))


def open_run(path: StrPath, step: int | None = None, average: bool = False) -> Run:
    """Open a run at a step, by default its last checkpoint, with its weights or their average.

    Raises:
      UserError: not a run, no such checkpoint, or no average was kept.
    """
    check_run(path)
    config = read_config(path)
    if average and not config.optimizer.average_decay:
        raise UserError(
            f"run {path} kept no average of its weights; train with optimizer.average_decay = 0.9999"
        )
    tower = read_tower(path)
    tokens = read_object(join(path, "tokens.json"), "identity", "max_length", "pad_id")
    tokenizer = load_tokenizer(join(path, "tokenizer.model"), tokens["max_length"], tokens["pad_id"])
    if tokenizer.identity != tokens["identity"]:
        raise UserError(
            f"{path}/tokenizer.model is not the tokenizer that the run was trained with; restore it"
        )
    model = text_tower(config.text, tokenizer, tower["width"])
    mesh = make_mesh(jax.local_devices())
    shapes = jax.eval_shape(lambda: init_params(model, config, np.zeros(tower["width"])))
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)), shapes)
    step, params = restore_params(path, step, target, "average" if average else "params")
    return Run(os.fspath(path), config, step, params, tower, tokenizer, text_embedder(model, tokenizer, mesh))
