"""Find the features of a dataset that were made by a given tower."""

from __future__ import annotations

import hashlib
from typing import Any

from lit_fast.data.dataset import Dataset
from lit_fast.data.features import Features, embed_command, open_features, stored_towers
from lit_fast.errors import UserError


def with_views(tower: dict[str, Any], views: int) -> dict[str, Any]:
    """Return the `tower.json` of a tower applied to `views` views of every image.

    With one view it is unchanged. Otherwise `first_view` holds the identity of the tower with view 0 alone.
    """
    if views == 1:
        return tower
    first = tower["identity"]
    identity = hashlib.blake2b(f"{first} views {views}".encode(), digest_size=16).hexdigest()
    return tower | {"identity": identity, "first_view": first, "views": views}


def first_view(tower: dict[str, Any]) -> str:
    """Return the identity of the tower with view 0 alone; equal identities give equal vectors of view 0."""
    return str(tower.get("first_view", tower["identity"]))


def matching_features(dataset: Dataset, tower: dict[str, Any]) -> Features:
    """Return the dataset's features of exactly this tower, whatever the number of further views.

    Raises:
      UserError: there are none.
    """
    stores = [open_features(dataset, name) for name in stored_towers(dataset)]
    for features in stores:
        if first_view(features.provenance) == first_view(tower):
            return features
    others = ", ".join(f.tower for f in stores)
    others = f" but {others}, of other weights, preprocessing or dtype" if others else ""
    name = tower["name"]
    if "imported" in tower:
        raise UserError(
            f"dataset {dataset.path} has no features of the run's tower {name}{others}, which were imported; import "
            f"those of the same model: lit-fast import-features SOURCE --out D --tower {name} --format FORMAT"
        )
    while name in stored_towers(dataset):
        name += "-2"
    raise UserError(
        f"dataset {dataset.path} has no features of the run's tower {tower['name']}{others}; make them with: "
        + embed_command(dataset, tower | {"views": 1}, name)
    )


def rows_without_features(dataset: Dataset, tower: dict[str, Any]) -> set[int]:
    """Return the rows without a usable feature of exactly this tower; raises as `matching_features`."""
    return set(matching_features(dataset, tower).invalid_rows())
