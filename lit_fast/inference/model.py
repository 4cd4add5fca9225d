"""A trained model: embed images and texts, and score how well they match.

model = lit_fast.load("runs/b8")  # a run, or a directory of `lit-fast export`
model.score(["cat.jpg"], ["a cat", "a dog"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy.special import expit, softmax

from lit_fast.config import LossConfig, TextConfig
from lit_fast.data.features import first_view, tower_options
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.inference.exported import (
    download_exported,
    is_exported,
    read_exported,
    read_vision_tower,
)
from lit_fast.models.two_towers import Params, apply_image_head, centered, text_embedder, text_tower
from lit_fast.runs.run import open_run
from lit_fast.runtime import make_mesh, replicated
from lit_fast.storage.files import exists, is_file, read_object
from lit_fast.storage.paths import StrPath, absolute, join
from lit_fast.storage.paths import name as last_part
from lit_fast.towers.embed import ImageLike, compile_tower, embed_images, open_tower
from lit_fast.towers.tower import Tower
from lit_fast.weights.resolve import find_repository


@dataclass(frozen=True)
class Model:
    """A frozen vision tower and the text tower trained for it.

    The vision tower is loaded on first use, so that embedding text does not need its weights.
    """

    name: str  # of the directory of the run or of the export
    step: int  # of the checkpoint
    average: bool  # whether the weights are the moving average
    tower_json: dict[str, Any]  # provenance of the features it was trained with, see lit_fast.data.features
    config: TextConfig
    loss: LossConfig
    tokenizer: Tokenizer
    params: Params  # see lit_fast.models.two_towers; numpy arrays, float32
    receipt: dict[str, Any] | None  # the run's receipt.json, if there is one
    open_tower: Callable[[], Tower]

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return int(self.tower_json["width"])

    @cached_property
    def tower(self) -> Tower:
        """The vision tower with its weights.

        Raises:
          UserError: the weights are absent, or are not those that the model was trained with.
        """
        return self.open_tower()

    def embed_image(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Embed images as `lit-fast embed` and the training do.

        Features are rounded to bfloat16, centred and multiplied by the image head, as far as the model has them.

        Args:
          images: files, PIL images or uint8 arrays [height, width, 3].

        Returns:
          Normalised embeddings float32 [n, width].

        Raises:
          UserError: an image cannot be used; the message names it.
        """
        if isinstance(images, str | os.PathLike | Image.Image):
            raise UserError("images is a single image; give a list of images")
        tower = self.tower
        limit = tower_options(self.tower_json).get("max_pixels", MAX_PIXELS)
        features = embed_images(self._run_tower, images, tower.preprocess, self.width, limit)
        return self.embed_features(features)

    def embed_features(self, features: np.ndarray) -> np.ndarray:
        """Return normalised embeddings float32 [n, width] of stored features [n, width]."""
        return apply_image_head(self.params, centered(features, self.params["mean"]))

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Return normalised embeddings float32 [n, width] of texts."""
        if isinstance(texts, str):
            raise UserError("texts is a single text; give a list of texts")
        return self._run_text(self._params_on_devices, texts)

    # The names of CLIP's methods.
    encode_image = embed_image
    encode_text = embed_text

    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Return `probabilities` float32 [images, texts] of images and texts."""
        return self.compare(self.embed_image(images), self.embed_text(texts))

    def compare(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Return `probabilities` float32 [n, m] of embeddings [n, width], [m, width]."""
        return self.probabilities(images @ texts.T)

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """Return the probabilities that images and texts match, from their cosines.

        Cosines and probabilities are float32 [images, texts]. Sigmoid loss: the probability of each pair, independent
        of the others, `sigmoid(t cos + b)`. Softmax loss: the probability of each text among the given ones,
        `softmax(t cos)` over the texts.
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
    def _params_on_devices(self) -> Params:
        return jax.device_put(self.params, replicated(make_mesh(jax.local_devices())))


def load(path: StrPath, *, step: int | None = None, average: bool = False, tower: str | None = None) -> Model:
    """Load a model from a run, an exported directory, or the Hugging Face Hub.

    Args:
      path: the directory, or hf:OWNER/NAME[@REVISION], which is downloaded on first use.
      step: of the run's checkpoint; by default the last.
      average: load the average of the run's weights, if one was kept.
      tower: file or name of the vision tower's weights, if they have moved since the features were computed.

    Raises:
      UserError: the directory is not a model or damaged, or has no such checkpoint or average.
    """
    path = os.fspath(path)
    name = last_part(absolute(path))
    if not exists(path) and (snapshot := find_repository(path)):
        try:
            path, name = download_exported(snapshot), snapshot.repository
        except UserError as error:
            raise UserError(f"{path} is not a directory here, and as a repository {error}") from None
    if not is_exported(path):
        return _load_run(path, step, average, tower)
    for option, is_set in (("step", step is not None), ("average", average), ("tower", tower is not None)):
        if is_set:
            raise UserError(f"{path} is an exported model, which has one set of weights; leave out {option}")
    exported = read_exported(path)
    return Model(name, *exported, open_tower=lambda: read_vision_tower(path, exported.tower_json))


def _load_run(path: str, step: int | None, average: bool, weights: str | None) -> Model:
    run = open_run(path, step, average)
    receipt = join(path, "receipt.json")
    return Model(
        name=run.name,
        step=run.step,
        average=average,
        tower_json=run.tower_json,
        config=run.config.text,
        loss=run.config.loss,
        tokenizer=run.tokenizer,
        params=jax.tree.map(np.asarray, run.params),
        receipt=read_object(receipt) if is_file(receipt) else None,
        open_tower=lambda: _open_tower_of_run(path, run.tower_json, weights),
    )


def _open_tower_of_run(path: str, provenance: dict[str, Any], weights: str | None) -> Tower:
    """Open the tower of a run's `tower.json`, from its source or from other weights."""
    if "architecture" not in provenance:
        raise UserError(
            f"the features that {path} was trained with were not made by lit-fast embed, so images cannot be embedded; "
            "use the model for texts only"
        )
    source = weights or provenance["source"]
    try:
        tower = open_tower(source, tower_options(provenance))
    except UserError as error:
        hint = "" if weights else "; if the vision tower's weights have moved, name them with --tower"
        raise UserError(f"{error}{hint}") from None
    if tower.provenance(provenance["dtype"])["identity"] != first_view(provenance):
        raise UserError(
            f"{source} is not the vision tower that {path} was trained with ({provenance['name']}, sha256 "
            f"{str(provenance.get('sha256', 'unknown'))[:12]}); name the right weights with --tower"
        )
    return tower
