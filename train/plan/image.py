"""The trained image tower of a plan, from the names of towers alone: no weights are read."""

from __future__ import annotations

import re
from dataclasses import replace

import jax.numpy as jnp

from lit_fast.config import Config
from lit_fast.data.dataset import open_dataset
from lit_fast.data.features import open_features, stored_towers
from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture, from_record
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.sizes import VARIANTS
from lit_fast.weights.registry import known_towers

PHOTOS_PER_CORE = (
    390  # JPEGs of 500 x 375 pixels that a core decodes and resizes in a second, benchmarks/README.md
)
_HALF = (0.5, 0.5, 0.5)  # mean and std; they change neither memory nor time


def plan_image_tower(config: Config) -> ImageTower | None:
    """Return the image tower of a configuration; None: it is frozen.

    It is that of `image.arch`, of `image.tower` or, without both, of the features. If `image.tower` is no name
    that `lit-fast towers` lists, `plan.tower` describes it.

    Raises:
      UserError: the tower is no ViT of lit_fast's own code.
    """
    image = config.image
    if not image.trained:
        return None
    if image.arch:
        architecture, size = _named(image.arch, "image.arch")
        pool = image.pool or "map"
        architecture = replace(architecture, pool=pool, class_token=pool == "tok")
    elif not image.tower and config.dataset and stored_towers(dataset := open_dataset(config.dataset)):
        provenance = open_features(dataset, config.tower).provenance
        try:
            architecture, size = from_record(provenance), int(provenance["preprocess"]["size"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"tower {provenance['name']} of {dataset.path} is not a ViT that can be trained; name one with "
                "image.tower"
            ) from None
    else:
        known = any(tower.name == image.tower for tower in known_towers())
        name, key = (image.tower, "image.tower") if known else (config.plan.tower, "plan.tower")
        architecture, size = _named(name, key)
        if image.pool:
            class_token = architecture.class_token or image.pool == "tok"
            architecture = replace(architecture, pool=image.pool, class_token=class_token)
    size = image.resolution or size
    return ImageTower(architecture, size, _HALF, _HALF, jnp.dtype(image.dtype))


def _named(name: str, key: str) -> tuple[Architecture, int]:
    """Return the architecture and the resolution of a tower."""
    for tower in known_towers():
        if tower.name == name:
            return tower.architecture, tower.resolution
    plain = re.fullmatch(r"([\w-]+)/([1-9]\d?)", name)
    if plain and plain[1] in VARIANTS:
        return Architecture(VARIANTS[plain[1]], int(plain[2]), "tok", "tanh"), 224
    raise UserError(
        f"config key {key}: {name!r} is not a ViT that can be trained; give a name of lit-fast towers, or a plain one "
        "such as B/16"
    )
