"""The data of a plan, from the dataset or from section [plan]."""

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
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.sizes import VARIANTS
from lit_fast.towers.torch.catalogue import is_published_name, random_tower
from lit_fast.train.cost.flops import tower_flops
from lit_fast.train.input_pipeline.packing import sampled_lengths
from lit_fast.weights.registry import known_towers


class Vocabulary(NamedTuple):
    """The properties of a tokenizer that determine the shapes of a text tower."""

    vocab_size: int
    max_length: int
    eos_id: int = 1


class PlanData(NamedTuple):
    """Dataset, features and tokens of a plan."""

    rows: int  # 0: unknown
    tower: str
    width: int  # of the features
    image_flops: float | None  # forward pass of the vision tower for one image; None: the features exist
    vocabulary: Vocabulary
    lengths: np.ndarray  # int64 [n], tokens of a sample of the captions
    description: str
    views: int = 1  # vectors per row


def plan_data(config: Config, image: ImageTower | None = None) -> PlanData:
    """Describe the dataset; section [plan] replaces missing features and tokens.

    Args:
      image: the trained image tower; no features are needed then.

    Raises:
      UserError: the dataset is damaged, or the tower is unknown.
    """
    plan = config.plan
    if not config.dataset and image:
        trained = f"trained image tower of {image.size} pixels"
        vocabulary = Vocabulary(plan.vocab_size, plan.max_length)
        return PlanData(plan.rows, trained, image.width, None, vocabulary, _lengths(config), trained)
    if not config.dataset:
        width, flops = _tower(plan.tower)
        vocabulary = Vocabulary(plan.vocab_size, plan.max_length)
        description = f"assumed: features of {plan.tower}"
        return PlanData(plan.rows, plan.tower, width, flops, vocabulary, _lengths(config), description)
    dataset = open_dataset(config.dataset)
    description, image_flops, views = f"dataset {dataset.path}", None, 1
    if image:
        tower, width = f"trained image tower of {image.size} pixels", image.width
        description += f"; {tower}"
    elif stored_towers(dataset):
        features = open_features(dataset, config.tower)
        tower, width, views = features.tower, features.width, features.views
        description += f", {len(features.finished())} of {dataset.shards} shards embedded by {tower}"
    else:
        tower = plan.tower
        width, image_flops = _tower(tower)
        description += f"; assumed: features of {tower}"
    if stored_tokenizers(dataset):
        tokens = open_tokens(dataset, config.tokenizer)
        tokenizer = tokens.tokenizer()
        vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.max_length, tokenizer.eos_id)
        lengths = sampled_lengths(tokens, tokenizer.eos_id)
    else:
        vocabulary, lengths = Vocabulary(plan.vocab_size, plan.max_length), _lengths(config)
    return PlanData(dataset.rows, tower, width, image_flops, vocabulary, lengths, description, views)


def _lengths(config: Config) -> np.ndarray:
    """Return caption lengths int64 [1024], uniform around the assumed mean."""
    longest = config.plan.max_length
    mean = min(config.plan.caption_tokens or longest, longest)
    deviation = min(mean - 1, longest - mean)
    return np.linspace(mean - deviation, mean + deviation, 1024).round().astype(np.int64)


def _tower(name: str) -> tuple[int, float]:
    """Return the feature width of a vision tower and its forward FLOPs per image."""
    for tower in known_towers():
        if tower.name == name:
            return tower.architecture.width, flops_per_image(tower.architecture, tower.resolution)
    plain = re.fullmatch(r"([\w-]+)/([1-9]\d{0,2})", name)
    if plain and plain[1] in VARIANTS and 224 % int(plain[2]) == 0:
        architecture = Architecture(VARIANTS[plain[1]], int(plain[2]), "tok", "tanh")
        return architecture.width, flops_per_image(architecture, 224)
    if is_published_name(name):
        published = random_tower(name)
        return published.width, tower_flops(published)
    near = difflib.get_close_matches(name, [tower.name for tower in known_towers()], 1, 0.5)
    hint = (
        f"did you mean {near[0]}?" if near else "lit-fast towers lists the names; a plain ViT is written B/16"
    )
    raise UserError(f"config key plan.tower: tower {name!r} is unknown; {hint}")
