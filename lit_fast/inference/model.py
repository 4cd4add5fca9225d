"""Embed images and texts with a trained model, and score how well they match.

model = lit_fast.load("runs/b8")  # a run, or a directory of `lit-fast export`
model.score(["cat.jpg"], ["a cat", "a dog"])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy.special import expit, softmax

from lit_fast.config import LossConfig, TextConfig
from lit_fast.data.features import tower_options
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.models.two_towers import Params, apply_image_head, centered, text_embedder, text_tower
from lit_fast.runtime import make_mesh, replicated
from lit_fast.towers.embed import ImageLike, compile_tower, embed_images
from lit_fast.towers.interface import FrozenTower


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
    open_tower: Callable[[], FrozenTower]

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return int(self.tower_json["width"])

    @cached_property
    def tower(self) -> FrozenTower:
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
          Normalized embeddings float32 [n, width].

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
        """Return normalized embeddings float32 [n, width] of stored features [n, width]."""
        return apply_image_head(self.params, centered(features, self.params["mean"]))

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Return normalized embeddings float32 [n, width] of texts."""
        if isinstance(texts, str):
            raise UserError("texts is a single text; give a list of texts")
        return self._run_text(texts)

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
    def _run_text(self) -> Callable[[Sequence[str]], np.ndarray]:
        mesh = make_mesh(jax.local_devices())
        module = text_tower(self.config, self.tokenizer, self.width)
        return partial(
            text_embedder(module, self.tokenizer, mesh), jax.device_put(self.params, replicated(mesh))
        )
