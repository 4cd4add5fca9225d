"""A trained model: a frozen vision tower and the text tower that belongs to it, ready to use.

model = lit_fast.load("runs/b8")  # a run, or what `lit-fast export` wrote
model.score(["cat.jpg"], ["a cat", "a dog"])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy.special import expit, softmax

from lit_fast.config import LossConfig, TextConfig
from lit_fast.data.features import tower_options
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.matching import first_view
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.inference.exported import is_exported, read_exported, read_vision_tower
from lit_fast.models.two_towers import Params, apply_image_head, centered, text_embedder, text_tower
from lit_fast.runs.run import open_run
from lit_fast.runtime import make_mesh, replicated
from lit_fast.storage.files import read_object
from lit_fast.towers.embed import ImageLike, compile_tower, embed_images, open_tower
from lit_fast.towers.tower import Tower


@dataclass(frozen=True)
class Model:
    """A frozen vision tower and the text tower trained for it.

    The vision tower is loaded when it is first needed; text alone does without.
    """

    name: str  # of the run's or the exported folder
    step: int  # of the checkpoint
    average: bool  # whether the weights are their moving average
    tower_json: dict[str, Any]  # provenance of the features it was trained with, see lit_fast.data.features
    config: TextConfig
    loss: LossConfig
    tokenizer: Tokenizer
    params: Params  # see lit_fast.runs.run; numpy arrays, float32
    receipt: dict[str, Any] | None  # receipt.json of the run, if there is one
    open_tower: Callable[[], Tower]

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return int(self.tower_json["width"])

    @cached_property
    def tower(self) -> Tower:
        """The vision tower with its weights.

        Raises:
          UserError: they are not where they were, or are not those that the model was trained with.
        """
        return self.open_tower()

    def embed_image(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Normalised embeddings float32 [n, width] of files, PIL images or uint8 arrays [height, width, 3].

        Those of the features that `lit-fast embed` stores: rounded to bfloat16, then centred and put through
        the image head, where the model has them.

        Raises:
          UserError: an image cannot be used; the message names it.
        """
        if isinstance(images, str | Path | Image.Image):
            raise UserError("images is a single one; give a list of them")
        tower = self.tower
        limit = tower_options(self.tower_json).get("max_pixels", MAX_PIXELS)
        features = embed_images(self._run_tower, images, tower.preprocess, self.width, limit)
        return self.embed_features(features)

    def embed_features(self, features: np.ndarray) -> np.ndarray:
        """Normalised embeddings float32 [n, width] of the tower's features [n, width], as they are stored."""
        return apply_image_head(self.params, centered(features, self.params["mean"]))

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Normalised embeddings float32 [n, width]."""
        if isinstance(texts, str):
            raise UserError("texts is a single one; give a list of them")
        return self._run_text(self._on_devices, texts)

    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """How well each image and text belong together, float32 [images, texts]; see `compare`."""
        return self.compare(self.embed_image(images), self.embed_text(texts))

    def compare(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """The model's `probabilities` float32 [n, m] of normalised embeddings [n, width] and [m, width]."""
        return self.probabilities(images @ texts.T)

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """What cosines of images with texts, float32 [n, m], mean to the model.

        Sigmoid loss: that the two belong together, each pair by itself, `sigmoid(t cos + b)`. Softmax loss: that
        the text is the image's among those given, `softmax(t cos)` over the texts.
        """
        logits = np.exp(self.params["t"][0]) * cosines
        if self.loss.name == "softmax":
            return softmax(logits, axis=1) if logits.size else logits
        return expit(logits + self.params["b"][0] if "b" in self.params else logits)

    @cached_property
    def _run_tower(self) -> Callable[[np.ndarray], jax.Array]:
        return compile_tower(self.tower, self.tower_json["dtype"])

    @cached_property
    def _run_text(self) -> Callable[[Params, Sequence[str]], np.ndarray]:
        module = text_tower(self.config, self.tokenizer, self.width)
        return text_embedder(module, self.tokenizer, make_mesh(jax.local_devices()))

    @cached_property
    def _on_devices(self) -> Params:
        return jax.device_put(self.params, replicated(make_mesh(jax.local_devices())))


def load(
    path: str | Path, *, step: int | None = None, average: bool = False, tower: str | None = None
) -> Model:
    """Load a model from a run's directory or from a folder that `lit-fast export` wrote.

    Args:
      path: the directory.
      step: of the run's checkpoint; by default the last.
      average: take the average of the run's weights, if one was kept.
      tower: file or name of the vision tower's weights, where they are no longer where they were when the
        features were made.

    Raises:
      UserError: neither of the two, damaged, or it has no such checkpoint or average.
    """
    path = Path(path)
    if not is_exported(path):
        return _load_run(path, step, average, tower)
    for option, given in (("step", step is not None), ("average", average), ("tower", tower is not None)):
        if given:
            raise UserError(f"{path} is an exported model, which has one set of weights; leave out {option}")
    found = read_exported(path)
    return Model(path.resolve().name, *found, open_tower=lambda: read_vision_tower(path, found.tower_json))


def _load_run(path: Path, step: int | None, average: bool, weights: str | None) -> Model:
    run = open_run(path, step, average)
    receipt = path / "receipt.json"
    return Model(
        name=run.name,
        step=run.step,
        average=average,
        tower_json=run.tower_json,
        config=run.config.text,
        loss=run.config.loss,
        tokenizer=run.tokenizer,
        params=jax.tree.map(np.asarray, run.params),
        receipt=read_object(receipt) if receipt.is_file() else None,
        open_tower=lambda: _tower_of(path, run.tower_json, weights),
    )


def _tower_of(path: Path, tower: dict[str, Any], weights: str | None) -> Tower:
    """The tower that a run's `tower.json` describes, from its own source or from other weights."""
    if "architecture" not in tower:
        raise UserError(
            f"the features that {path} was trained with were not made by lit-fast embed, so images cannot be embedded"
        )
    source = weights or tower["source"]
    try:
        found = open_tower(source, tower_options(tower))
    except UserError as error:
        hint = "" if weights else "; if the vision tower's weights have moved, name them with --tower"
        raise UserError(f"{error}{hint}") from None
    if found.provenance(tower["dtype"])["identity"] != first_view(tower):
        raise UserError(
            f"{source} is not the vision tower that {path} was trained with ({tower['name']}, sha256 "
            f"{str(tower.get('sha256', 'unknown'))[:12]}); name the right weights with --tower"
        )
    return found
