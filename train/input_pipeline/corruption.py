"""Corrupt training data: section 4.10 of the SigLIP paper.

Images become noise, texts become random tokens, and texts are exchanged within the batch. All random numbers depend
on (seed, step, position in the global batch) only, so that neither the number of devices nor of processes changes
them. The row numbers of a batch stay: for the loss a corrupted pair is as positive as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_fast.config import StreamConfig
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import BFLOAT16, Features, matching_features
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.train.input_pipeline.captions import row_hash
from lit_fast.utils.permutation import permutation, random_words

_ALIGNMENT, _IMAGES, _TEXTS = range(3)  # keys of independent random numbers


@dataclass(frozen=True)
class Corruption:
    """The corruption of the batches of a run."""

    config: StreamConfig
    seed: int
    tokenizer: Tokenizer
    text_ids: np.ndarray  # int64 [n], the ids of random texts
    noise: np.ndarray  # bfloat16 [n, width], features of noise images
    noise_digest: str  # of the rows of the noise dataset

    @property
    def identity(self) -> list[Any]:
        """Everything here that the batches depend on."""
        c = self.config
        shares = [c.corrupt_images, c.corrupt_texts, c.corrupt_alignment]
        return ["corrupt", *shares, self.noise_digest, len(self.noise)]

    @property
    def description(self) -> str:
        """The corrupted shares, for the user."""
        c = self.config
        shares = {"images": c.corrupt_images, "texts": c.corrupt_texts, "alignment": c.corrupt_alignment}
        return ", ".join(f"{share:.3g} of the {name}" for name, share in shares.items() if share)

    def text_positions(self, step: int) -> np.ndarray | None:
        """Return the position int64 [batch] that each position takes its texts from; None: its own.

        The chosen share of the positions is shifted along one cycle, so that none of them keeps its texts.
        """
        if not self.config.corrupt_alignment:
            return None
        batch = self.config.global_batch
        positions = np.arange(batch)
        count = round(self.config.corrupt_alignment * batch)
        chosen = permutation(batch, self.seed, step, _ALIGNMENT)[:count]
        positions[chosen] = np.roll(chosen, 1)
        return positions

    def replace(self, step: int, first: int, images: np.ndarray | None, ids: np.ndarray) -> None:
        """Replace some images by noise and some texts by random tokens, in place.

        Args:
          step: of the batch.
          first: position of the first image in the global batch.
          images: bfloat16 [n, width]; None: pixels, which have no noise.
          ids: integer [n * captions, length].
        """
        captions = self.config.captions_per_image
        if images is not None:
            bad, words = self._draw(_IMAGES, step, self.config.corrupt_images, first, len(images))
            images[bad] = self.noise[(words & np.uint64(2**32 - 1)).astype(np.int64) * len(self.noise) >> 32]
        bad, words = self._draw(_TEXTS, step, self.config.corrupt_texts, first * captions, len(ids))
        ids[bad] = self._random_texts(words)

    def _draw(
        self, key: int, step: int, share: float, first: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose a share of `count` consecutive positions.

        Returns:
          The chosen positions int64 [m], counted from `first`, and a random word uint64 [m] for each. Its upper half
          was used for the choice; its lower half is unused.
        """
        if not share:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        words = random_words(first + count, self.seed, step, key)[first:]
        chosen = np.flatnonzero((words >> np.uint64(32)) < share * 2**32)
        return chosen, words[chosen]

    def _random_texts(self, words: np.ndarray) -> np.ndarray:
        """Return ids int64 [m, length] of 1 to length - 1 random tokens, end-of-sentence and padding."""
        length = self.tokenizer.max_length
        draws = row_hash(words[:, None] + np.arange(length, dtype=np.uint64), self.seed)
        count = 1 + (draws[:, 0] * (length - 1) >> 32)
        ids = np.full((len(words), length), self.tokenizer.pad_id)
        ids[:, :-1] = self.text_ids[draws[:, 1:] * len(self.text_ids) >> 32]
        ids = np.where(np.arange(length) < count[:, None], ids, self.tokenizer.pad_id)
        ids[np.arange(len(words)), count] = self.tokenizer.eos_id
        return ids


def open_corruption(
    features: Features | None, tokens: Tokens, config: StreamConfig, seed: int
) -> Corruption | None:
    """Return the corruption that a configuration asks for; None: none.

    Without features there are no noise images.

    Raises:
      UserError: the noise dataset is missing or was embedded by another tower than `features`.
    """
    if not (config.corrupt_images or config.corrupt_texts or config.corrupt_alignment):
        return None
    noise, digest = np.empty((0, features.width if features else 0), BFLOAT16), ""
    if config.corrupt_images and features:
        store = matching_features(open_dataset(config.noise), features.provenance)
        noise = np.delete(store.read_all(), sorted(store.invalid_rows()), axis=0)
        if not len(noise):
            raise UserError(f"{store.path} has no valid row; use another dataset for stream.noise")
        digest = store.dataset.digest
    tokenizer = tokens.tokenizer()
    text_ids = tokenizer.text_ids()
    if not len(text_ids):
        raise UserError(f"{tokens.path} has no piece of text for random texts; set stream.corrupt_texts = 0")
    return Corruption(config, seed, tokenizer, text_ids, noise, digest)
