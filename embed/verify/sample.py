"""Embed a sample of rows again and compare them with the stored features."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import SHARD
from lit_fast.data.features import Features, Manifest, first_view, tower_options
from lit_fast.data.images.decode import MAX_PIXELS
from lit_fast.data.images.sources import check_sources
from lit_fast.embed.verify.findings import Finding, repair_remedy, some
from lit_fast.errors import UserError
from lit_fast.runtime import start_devices
from lit_fast.towers.embed import compile_tower, default_batch_size, open_tower
from lit_fast.towers.interface import FrozenTower
from lit_fast.towers.loader import ImageLoader
from lit_fast.utils.output import result

# Smallest cosine between a stored vector and the same one computed again, by the dtype of the computation.
# Storing rounds to 8 bits: 1 - 3e-6; float32 on other hardware differs by less than that. In bfloat16 every layer
# rounds, in other places on other hardware: 1 - 3e-4 for a ViT-Ti/16 on photos. Different photos have at most 0.85.
_MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.99}


def verify_sample(
    features: Features, array: ts.TensorStore, manifests: list[Manifest], sample: int
) -> Iterator[Finding]:
    """Embed evenly spaced rows again; yield a finding per shard with other features.

    Args:
      array: `features.array()`.
      manifests: of the shards to take rows from.
      sample: number of rows; each shard has at least one.
    """
    part = f"features {features.tower}"
    tower = open_stored_tower(features)
    if isinstance(tower, Finding):
        yield tower
        return
    try:
        check_sources(features.dataset)
    except UserError as error:
        yield Finding(part, f"no row was embedded again: {error}", wrong=False)
        return
    rows = _sampled_rows(manifests, sample)
    dtype = features.provenance["dtype"]
    max_pixels = tower_options(features.provenance).get("max_pixels", MAX_PIXELS)
    loader = ImageLoader(features.dataset, tower.preprocess, max_pixels, features.views)
    run = compile_tower(tower, dtype)
    batch_rows = max(1, default_batch_size() // features.views) * jax.local_device_count()
    different: dict[int, list[str]] = {}  # shard -> rows with reasons
    smallest, compared = 1.0, 0
    for lo in range(0, len(rows), batch_rows):
        chunk = rows[lo : lo + batch_rows]
        pixels = np.zeros((batch_rows, *loader.shape), np.uint8)
        invalid: dict[int, str] = {}
        try:
            for i, row in enumerate(chunk):
                invalid |= loader.load(row, 1, pixels[i : i + 1])
        except UserError as error:  # an index record or a source that cannot be read
            what = f"row {row:,} and those after it were not embedded again: {error}"
            yield Finding(part, what, wrong=False)
            break
        computed = np.asarray(run(pixels.reshape(-1, *loader.shape[1:])))
        computed = computed.reshape(batch_rows, features.views, features.width)[: len(chunk)]
        stored = np.stack([array[row].read().result() for row in chunk]).astype(np.float32)
        cosines = _cosine(computed, stored.reshape(computed.shape)).min(axis=1)
        compared += len(chunk)
        for row, cosine in zip(chunk, cosines.tolist(), strict=True):
            if row in invalid:
                reason = f"its image cannot be decoded ({invalid[row]})"
            elif not cosine >= _MIN_COSINE[dtype]:  # also NaN
                reason = f"cosine {cosine:.4f}"
            else:
                smallest = min(smallest, cosine)
                continue
            different.setdefault(row // SHARD, []).append(f"row {row:,}: {reason}")
    for shard, found in sorted(different.items()):
        what = f"{len(found)} of the rows embedded again differ from the stored ones ({some(found)})"
        yield Finding(part, what, repair_remedy(features), shard)
    if compared and not different:
        result(f"{part}: {compared} rows embedded again, smallest cosine {smallest:.6f}")


def open_stored_tower(features: Features) -> FrozenTower | Finding:
    """Return the tower that tower.json records, or a finding if it is not available."""
    part, provenance = f"features {features.tower}", features.provenance
    if "imported" in provenance:
        what = "no row was embedded again: the features were imported, and their model is not available"
        return Finding(part, what, wrong=False)
    start_devices()
    try:
        tower = open_tower(provenance["source"], tower_options(provenance))
    except UserError as error:
        return Finding(
            part, f"no row was embedded again: {error}", "give --sample 0 to skip this", wrong=False
        )
    if tower.sha256 != provenance.get("sha256"):
        what = f"{provenance['source']} holds other weights than those that made the features"
        return Finding(part, what, f"restore the file with sha256 {provenance.get('sha256')}")
    if tower.provenance(provenance["dtype"])["identity"] != first_view(provenance):
        what = "this version of lit_fast makes other vectors of these weights than tower.json says"
        return Finding(part, what, "use the version that tower.json names, or embed under another --name")
    return tower


def _sampled_rows(manifests: list[Manifest], sample: int) -> list[int]:
    """Return evenly spaced valid rows, at least one of every shard."""
    rows: list[int] = []
    total = sum(m.rows for m in manifests)
    for manifest in manifests:
        valid = np.setdiff1d(np.arange(manifest.rows), [r - manifest.first for r in manifest.invalid])
        count = min(len(valid), max(1, round(sample * manifest.rows / total)))
        if count:
            positions = ((np.arange(count) + 0.5) * len(valid) / count).astype(int)
            rows += (manifest.first + valid[positions]).tolist()
    return rows


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosines `[n, views]` of float32 `[n, views, width]`; 0 for zeros."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=-1) / np.maximum(norms, 1e-30)
