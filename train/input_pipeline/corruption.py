"""Corrupted training data: section 4.10 of the SigLIP paper.

Images become noise, texts become random tokens, and texts change places within the batch. Everything is drawn
from (seed, step, place in the global batch), so that neither devices nor processes change it. The row number of
a place stays: to the loss a corrupted pair is as positive as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import BFLOAT16, Features
from lit_fast.data.matching import matching_features
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.captions import row_hash
from lit_fast.utils.permutation import permutation, random_words

_ALIGNMENT, _IMAGES, _TEXTS = range(3)  # purposes that numbers are drawn for


@dataclass(frozen=True)
class Corruption:
    """What is done to the batches of a run."""

    config: StreamConfig
    seed: int
    tokenizer: Tokenizer
    text_ids: np.ndarray  # int64 [n], that random texts are made of
    noise: np.ndarray  # bfloat16 [n, width], features of noise images
    noise_digest: str  # of the rows that they are of

    @property
    def identity(self) -> list[Any]:
        """Of everything here that decides the batches."""
        config = self.config
        told = ["corrupt", config.corrupt_images, config.corrupt_texts, config.corrupt_alignment]
        return [*told, self.noise_digest, len(self.noise)]

    @property
    def description(self) -> str:
        """For the user."""
        config = self.config
        shares = (
            ("images", config.corrupt_images),
            ("texts", config.corrupt_texts),
            ("alignment", config.corrupt_alignment),
        )
        return ", ".join(f"{share:.3g} of the {name}" for name, share in shares if share)

    def origins(self, step: int) -> np.ndarray:
        """The place int64 [batch] that the texts of each place come from.

        The chosen share of the places is shuffled as one cycle, so that none of them keeps its texts.
        """
        batch = self.config.global_batch
        origins = np.arange(batch)
        count = round(self.config.corrupt_alignment * batch)
        if count:
            chosen = permutation(batch, self.seed, step, _ALIGNMENT)[:count]
            origins[chosen] = np.roll(chosen, 1)
        return origins

    def replace(self, step: int, first: int, images: np.ndarray, ids: np.ndarray) -> None:
        """Put noise in the place of images and texts.

        Args:
          step: of the batch.
          first: place of the first image in the global batch.
          images: bfloat16 [n, width], changed in place.
          ids: integer [n * captions, length], likewise.
        """
        captions = self.config.captions_per_image
        bad, lots = self._drawn(_IMAGES, step, self.config.corrupt_images, first, len(images))
        images[bad] = self.noise[(lots & np.uint64(2**32 - 1)).astype(np.int64) * len(self.noise) >> 32]
        bad, lots = self._drawn(_TEXTS, step, self.config.corrupt_texts, first * captions, len(ids))
        ids[bad] = self._random_texts(lots)

    def _drawn(
        self, purpose: int, step: int, share: float, first: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of `count` consecutive places are corrupted, int64 [m], and a random word uint64 [m] of each.

        The upper half of the word decided; the lower is still free.
        """
        if not share:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        words = random_words(first + count, self.seed, step, purpose)[first:]
        bad = np.flatnonzero((words >> np.uint64(32)) < share * 2**32)
        return bad, words[bad]

    def _random_texts(self, lots: np.ndarray) -> np.ndarray:
        """Ids int64 [m, length]: uniformly 1 to length - 1 random ones, then end and padding as everywhere."""
        length = self.tokenizer.max_length
        draws = row_hash(lots[:, None] + np.arange(length, dtype=np.uint64), self.seed)
        count = 1 + (draws[:, 0] * (length - 1) >> 32)
        ids = np.full((len(lots), length), self.tokenizer.pad_id)
        ids[:, :-1] = self.text_ids[draws[:, 1:] * len(self.text_ids) >> 32]
        place = np.arange(length)
        ids = np.where(place < count[:, None], ids, self.tokenizer.pad_id)
        ids[np.arange(len(lots)), count] = self.tokenizer.eos_id
        return ids


def open_corruption(features: Features, tokens: Tokens, config: StreamConfig, seed: int) -> Corruption | None:
    """What the configuration says is done to the batches; None: nothing.

    Raises:
      UserError: the noise is not there or was embedded by another tower than `features`.
    """
    if not (config.corrupt_images or config.corrupt_texts or config.corrupt_alignment):
        return None
    noise, digest = np.empty((0, features.width), BFLOAT16), ""
    if config.corrupt_images:
        store = matching_features(open_dataset(config.noise), features.provenance)
        noise = np.delete(store.read_all(), sorted(store.invalid_rows()), axis=0)
        if not len(noise):
            raise UserError(f"{store.path} has no valid row; make other noise")
        digest = store.dataset.digest
    tokenizer = tokens.tokenizer()
    text_ids = tokenizer.text_ids()
    if not len(text_ids):
        raise UserError(f"{tokens.path} has no piece of text to make random texts of")
    return Corruption(config, seed, tokenizer, text_ids, noise, digest)
