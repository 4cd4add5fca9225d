"""A run: a directory with one training's resolved config, tower, tokenizer, metrics and checkpoints.

W/config.toml                    resolved
W/tower.json                     provenance of the tower it was trained with
W/tokenizer.model, tokens.json   the tokenizer and its rules
W/metrics.jsonl, tensorboard/    what happened, see `lit_fast.metrics`
W/receipt.json, report.html      what it took and what came out, written when it stops
W/checkpoints/<step>/            see `lit_fast.checkpoint`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lit_fast.checkpoint import restore_params
from lit_fast.config import REMOVED, Config, TextConfig, load_config
from lit_fast.dataset import Dataset
from lit_fast.errors import UserError
from lit_fast.features import Features, embed_command, first_view, open_features, stored_towers
from lit_fast.files import read_object
from lit_fast.mesh import dealt, make_mesh, replicated
from lit_fast.normalize import EPSILON, normalize
from lit_fast.text import TextTower
from lit_fast.tokens import Tokenizer, load_tokenizer

Params = dict[str, Any]
"""{"txt": the text tower, "t": log temperature [1], "b": bias [1], "mean": image mean [width],
"img": {"head": {"kernel": image head [width, width]}}}; "b" and "img" only where the loss has them."""

EMBED_BATCH = 512


def text_tower(config: TextConfig, tokenizer: Tokenizer, out_dim: int) -> TextTower:
    """The module that a configuration describes; `out_dim` is the features' width.

    Raises:
      UserError: without a head the two widths must agree.
    """
    width = config.shape.width
    if not config.head and width != out_dim:
        raise UserError(
            f"text.head = false needs a tower as wide as the features: set text.width = {out_dim} (it is {width}), "
            f"or text.head = true"
        )
    return TextTower(
        shape=config.shape,
        vocab_size=tokenizer.vocab_size,
        max_length=tokenizer.max_length,
        out_dim=out_dim,
        pooling=config.pooling,
        eos_id=tokenizer.eos_id if config.mask_padding else None,
        embedding_width=config.embedding_width,
        projected=config.head,
        dropout=config.dropout,
        keep=config.layers_keep,
        pack=config.pack,
        dtype=jnp.dtype(config.dtype),
    )


def init_params(model: TextTower, config: Config, mean: np.ndarray) -> Params:
    """Fresh parameters with big_vision's names; `mean` is zero where images are not centred."""
    ids = jnp.zeros((1, model.max_length), jnp.int32)
    params: Params = {
        "txt": jax.jit(model.init)(jax.random.key(config.seed), ids)["params"],
        "t": jnp.log(jnp.full((1,), config.loss.temperature_init, jnp.float32)),
        "mean": jnp.asarray(mean, jnp.float32),
    }
    if config.loss.name == "sigmoid" and config.loss.bias:
        params["b"] = jnp.full((1,), config.loss.bias_init, jnp.float32)
    if config.loss.image_head:
        params["img"] = {"head": {"kernel": jnp.eye(len(mean), dtype=jnp.float32)}}
    return params


def embed_ids(
    model: TextTower,
    params: Params,
    ids: jax.Array,
    lengths: jax.Array | None = None,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """Normalised embeddings float32 [n, width] of ids integer [n, length]; `dropout` is a key, None: none.

    With `lengths` [n, k] a row holds k captions side by side, and there are n k embeddings.
    """
    rngs = None if dropout is None else {"dropout": dropout}
    texts = model.apply(
        {"params": params["txt"]}, ids.astype(jnp.int32), lengths, deterministic=dropout is None, rngs=rngs
    )
    return normalize(jnp.asarray(texts))


def text_embedder(
    model: TextTower, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[Params, Sequence[str]], np.ndarray]:
    """A function of (params, texts) to normalised float32 [n, width], compiled once, over all devices."""
    batch = -(-EMBED_BATCH // mesh.size) * mesh.size

    @partial(jax.jit, in_shardings=(replicated(mesh), dealt(mesh)), out_shardings=replicated(mesh))
    def embed(params: Params, ids: jax.Array) -> jax.Array:
        return embed_ids(model, params, ids)

    def embed_text(params: Params, texts: Sequence[str]) -> np.ndarray:
        ids = tokenizer(texts)
        out = []
        for lo in range(0, len(ids), batch):
            part = ids[lo : lo + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
            # Of several processes each has all ids and gives its devices their part.
            dealt_ids = jax.make_array_from_callback(padded.shape, dealt(mesh), padded.__getitem__)
            out.append(np.asarray(embed(params, dealt_ids))[: len(part)])
        return np.concatenate(out) if out else np.zeros((0, model.out_dim), np.float32)

    return embed_text


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


def centered(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Features [n, width], as they are stored, less `mean` and normalised, float32."""
    return _normalized(features.astype(np.float32) - mean)


def apply_image_head(params: Params, images: np.ndarray) -> np.ndarray:
    """Normalised embeddings float32 [n, width] of centred and normalised features, by the head if there is one."""
    if "img" not in params:
        return images
    return _normalized(images @ np.asarray(params["img"]["head"]["kernel"]))


def _normalized(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + EPSILON)


def matching_features(dataset: Dataset, tower: dict[str, Any]) -> Features:
    """The dataset's features of exactly this tower; how many more views either has does not matter.

    Raises:
      UserError: there are none.
    """
    have = [open_features(dataset, name) for name in stored_towers(dataset)]
    for features in have:
        if first_view(features.provenance) == first_view(tower):
            return features
    named = (
        f" but {', '.join(f.tower for f in have)}, of other weights, preprocessing or dtype" if have else ""
    )
    name = tower["name"]
    if "imported" in tower:
        raise UserError(
            f"dataset {dataset.path} has no features of the run's tower {name}{named}, which were imported; bring the "
            f"same model's: lit-fast import-features SOURCE --out D --tower {name} --format FORMAT"
        )
    while name in stored_towers(dataset):
        name += "-2"
    raise UserError(
        f"dataset {dataset.path} has no features of the run's tower {tower['name']}{named}; make them with: "
        + embed_command(dataset, tower | {"views": 1}, name)
    )


def rows_without_features(dataset: Dataset, tower: dict[str, Any]) -> set[int]:
    """The rows that `image_embeddings` leaves out; errors as for `matching_features`."""
    return set(matching_features(dataset, tower).invalid_rows())


def read_tower(run: Path) -> dict[str, Any]:
    """The run's `tower.json`.

    Raises:
      UserError: it is missing or damaged.
    """
    return read_object(
        run / "tower.json", "name", "source", "identity", "width",
        name=str, source=str, identity=str, width=int, views=int, dtype=str, preprocess=dict, options=dict,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """An opened run, ready to embed."""

    path: Path
    config: Config
    step: int
    params: Params
    tower_json: dict[str, Any]
    tokenizer: Tokenizer
    embedder: Callable[[Params, Sequence[str]], np.ndarray]

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

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


def check_run(path: Path) -> None:
    """Raises UserError where there is no run; reads nothing big."""
    if not path.exists():
        raise UserError(
            f"run {path} does not exist; make it with: lit-fast train CONFIG.toml --workdir {path}"
        )
    for name in ("config.toml", "tower.json", "tokens.json", "tokenizer.model"):
        if not (path / name).is_file():
            raise UserError(f"{path} is not a run ({name} is missing); make it with: lit-fast train")


def read_config(run: Path) -> Config:
    """The resolved configuration of a run, also of an earlier version.

    The keys that are no more were about memory and change nothing but rounding.

    Raises:
      UserError: it is missing or damaged.
    """
    return load_config(run / "config.toml", ignored=REMOVED)


def open_run(path: Path, step: int | None = None, average: bool = False) -> Run:
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
    tokens = read_object(path / "tokens.json", "identity", "max_length", "pad_id")
    tokenizer = load_tokenizer(path / "tokenizer.model", tokens["max_length"], tokens["pad_id"])
    if tokenizer.identity != tokens["identity"]:
        raise UserError(
            f"{path}/tokenizer.model is not the tokenizer that the run was trained with; restore it"
        )
    model = text_tower(config.text, tokenizer, tower["width"])
    mesh = make_mesh(jax.local_devices())
    shapes = jax.eval_shape(lambda: init_params(model, config, np.zeros(tower["width"])))
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)), shapes)
    step, params = restore_params(path, step, target, "average" if average else "params")
    return Run(path, config, step, params, tower, tokenizer, text_embedder(model, tokenizer, mesh))
