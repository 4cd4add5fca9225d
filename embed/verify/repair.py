"""Embed the shards with damaged features again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_fast.data.features import Features, tower_options
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.extract import embed_dataset
from lit_fast.embed.shard_writer import journal_path
from lit_fast.embed.verify.features import verify_features
from lit_fast.embed.verify.findings import Finding, repair_remedy
from lit_fast.embed.verify.sample import open_stored_tower
from lit_fast.errors import UserError
from lit_fast.storage.files import remove
from lit_fast.storage.paths import join


def repair_features(features: Features, wrong: Sequence[Finding], sample: int) -> Iterator[Finding]:
    """Embed the shards of findings again, and yield the findings of a second check of them.

    The manifest is deleted first, so that a shard under repair never counts as finished.

    Raises:
      UserError: the tower's weights or the images are missing, or make other vectors than the store's.
    """
    if "imported" in features.provenance:
        raise UserError(
            f"{features.path} was imported and cannot be embedded here; {repair_remedy(features)}"
        )
    check_sources(features.dataset)
    tower = open_stored_tower(features)
    if isinstance(tower, Finding):
        raise UserError(f"{features.path} cannot be repaired: {tower.what}; {tower.remedy}")
    shards = sorted({f.shard for f in wrong if f.shard is not None})
    has_wrong_metadata = any(f.shard is None for f in wrong)
    for shard in shards:
        remove(features.manifest_path(shard))
        remove(journal_path(features, shard))
        remove(features.shard_path(shard))  # TensorStore would read the end of a short one
    if has_wrong_metadata:
        try:
            features.array(create=True)
        except UserError:  # zarr.json has no information that tower.json and the dataset lack
            remove(join(features.path, "zarr.json"))
            features.array(create=True)
    embed_dataset(
        features.dataset.path,
        features.provenance["source"],
        name=features.tower,
        views=features.views,
        dtype=features.provenance["dtype"],
        share=(0, 1),
        **tower_options(features.provenance),
    )
    every = range(features.dataset.shards)
    yield from verify_features(features, every if has_wrong_metadata else shards, sample)
