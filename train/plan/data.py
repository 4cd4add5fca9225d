"""What a plan knows of the data: the dataset's own figures where there is one, else those of the config's `plan`."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import numpy as np

from lit_fast.config import Config
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features, stored_towers
from lit_fast.data.tokens import open_tokens, stored_tokenizers
from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture, flops_per_image
from lit_fast.models.sizes import VARIANTS
from lit_fast.train.input_pipeline.packing import sampled_lengths
from lit_fast.weights.registry import known_towers


class Vocabulary(NamedTuple):
    """As much of a tokenizer as a text tower's shape depends on."""

    vocab_size: int
    max_length: int
    eos_id: int = 1


class Data(NamedTuple):
    """Of one plan."""

    rows: int  # 0: not known
    tower: str
    width: int  # of the features
    image_flops: float | None  # of the tower, forward, for one image; None: the features are there
    vocabulary: Vocabulary
    lengths: np.ndarray  # of a sample of the captions, tokens
    description: str
    views: int = 1  # vectors of a row


def known_data(config: Config) -> Data:
    """What the dataset says, and what is assumed in its place.

    Raises:
      UserError: the dataset is damaged, or the tower is not known.
    """
    assumed = config.plan
    vocabulary = Vocabulary(assumed.vocab_size, assumed.max_length)
    flops: float | None
    views = 1
    if not config.dataset:
        width, flops = _tower(assumed.tower)
        where = f"assumed: features of {assumed.tower}"
        return Data(assumed.rows, assumed.tower, width, flops, vocabulary, _lengths(config), where)
    dataset = open_dataset(config.dataset)
    tower, where = assumed.tower, f"dataset {dataset.path}"
    if stored_towers(dataset):
        features = open_features(dataset, config.tower)
        tower, width, flops, views = features.tower, features.width, None, features.views
        where += f", {len(features.finished())} of {dataset.shards} shards embedded by {tower}"
    else:
        width, flops = _tower(tower)
        where += f"; assumed: features of {tower}"
    lengths = _lengths(config)
    if stored_tokenizers(dataset):
        tokens = open_tokens(dataset, config.tokenizer)
        tokenizer = tokens.tokenizer()
        vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.max_length, tokenizer.eos_id)
        lengths = sampled_lengths(tokens, tokenizer.eos_id)
    return Data(dataset.rows, tower, width, flops, vocabulary, lengths, where, views)


def _lengths(config: Config) -> np.ndarray:
    """Spread evenly on both sides of the mean that is assumed."""
    longest = config.plan.max_length
    mean = min(config.plan.caption_tokens or longest, longest)
    reach = min(mean - 1, longest - mean)
    return np.linspace(mean - reach, mean + reach, 1024).round().astype(np.int64)


def _tower(name: str) -> tuple[int, float]:
    """Width of its features, and FLOPs of its forward pass for one image."""
    for tower in known_towers():
        if tower.name == name:
            return tower.architecture.width, flops_per_image(tower.architecture, tower.resolution)
    plain = re.fullmatch(r"([\w-]+)/([1-9]\d{0,2})", name)
    if plain and plain[1] in VARIANTS and 224 % int(plain[2]) == 0:
        architecture = Architecture(VARIANTS[plain[1]], int(plain[2]), "tok", "tanh")
        return architecture.width, flops_per_image(architecture, 224)
    near = difflib.get_close_matches(name, [tower.name for tower in known_towers()], 1, 0.5)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else "`lit-fast towers` lists the names; a plain ViT is written B/16"
    )
    raise UserError(f"config key plan.tower: no tower {name!r} is known; {hint}")
