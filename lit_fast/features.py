"""The features of one tower over one dataset: `[rows, width]` bfloat16 in TensorStore.

    D/features/<tower>/tower.json            provenance: how to make the same vectors again
    D/features/<tower>/zarr.json, c/...      zarr3, shards of 65 536 rows, blocks of 1024, crc32c
    D/features/<tower>/manifest/00000.json   one per finished shard, written last

A shard exists when its manifest exists. Features are the tower's pooled output, not normalised.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from lit_fast.dataset import BLOCK, SHARD, Dataset
from lit_fast.errors import UserError
from lit_fast.files import read_json, read_object, write_json

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# One context for every array: resources written into separate specs would be separate pools.
_CONTEXT = ts.Context({"file_io_concurrency": {"limit": 16}, "cache_pool": {"total_bytes_limit": 0}})


@dataclass(frozen=True)
class Manifest:
    """What is known of one finished shard."""

    shard: int
    first: int  # first row
    rows: int
    keys: str  # digest of the rows' keys, as in dataset.json
    tower: str  # digest of tower.json's identity
    invalid: dict[int, str]  # row -> why its image could not be decoded; its feature is zero


@dataclass(frozen=True)
class Features:
    """A feature store, perhaps unfinished."""

    dataset: Dataset
    tower: str  # the name in the path
    provenance: dict[str, Any]  # tower.json

    @property
    def path(self) -> Path:
        """`D/features/<tower>`."""
        return self.dataset.path / "features" / self.tower

    @property
    def width(self) -> int:
        """Length of one feature vector."""
        return int(self.provenance["width"])

    @property
    def identity(self) -> str:
        """Digest of everything that decides the vectors."""
        return str(self.provenance["identity"])

    def array(self, *, create: bool = False) -> ts.TensorStore:
        """The `[rows, width]` bfloat16 array; a missing block is an error, never zeros."""
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self.path}/"},
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }
        if create:
            spec["metadata"] = _metadata(self.dataset.rows, self.width)
        try:
            return ts.open(spec, context=_CONTEXT, open=True, create=create).result()
        except ValueError as error:
            raise UserError(f"{self.path} cannot be opened: {str(error).splitlines()[0]}") from None

    def manifest_path(self, shard: int) -> Path:
        """Where the manifest of a shard lies."""
        return self.path / "manifest" / f"{shard:05d}.json"

    def finished(self) -> list[int]:
        """Shards that are complete, in order; one listing, nothing is opened."""
        names = (p.stem for p in (self.path / "manifest").glob("*.json"))
        return sorted(int(n) for n in names if n.isdigit() and int(n) < self.dataset.shards)

    def manifest(self, shard: int) -> Manifest:
        """Read one shard's manifest.

        Raises:
          UserError: it is missing or damaged.
        """
        path = self.manifest_path(shard)
        value = read_json(path)
        try:
            value["invalid"] = {int(row): why for row, why in value["invalid"].items()}
            return Manifest(**value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None

    def write_manifest(self, manifest: Manifest) -> None:
        """Declare a shard complete; call it only after its data are on the disk."""
        value = manifest.__dict__ | {"invalid": {str(r): why for r, why in sorted(manifest.invalid.items())}}
        write_json(self.manifest_path(manifest.shard), value)

    def invalid_rows(self) -> dict[int, str]:
        """Rows without a usable feature, from all shards.

        Also the one check of the join: every shard must be complete and belong to these rows and to this
        tower.

        Raises:
          UserError: a shard is missing or was made from other rows or by another tower.
        """
        missing = sorted(set(range(self.dataset.shards)) - set(self.finished()))
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {self.dataset.shards} shards are missing (first: {missing[0]}); "
                f"finish them with: {embed_command(self.dataset, self.provenance, self.tower)}"
            )
        invalid: dict[int, str] = {}
        for shard in range(self.dataset.shards):
            manifest = self.manifest(shard)
            if manifest.keys != self.dataset.shard_keys[shard]:
                raise UserError(
                    f"{self.path}: shard {shard} was made from other rows than {self.dataset.path}"
                )
            if manifest.rows != min(SHARD, self.dataset.rows - shard * SHARD):
                raise UserError(
                    f"{self.path}: shard {shard} has {manifest.rows} rows, {self.dataset.path} has others"
                )
            if manifest.tower != self.identity:
                raise UserError(f"{self.path}: shard {shard} was made by another tower than tower.json says")
            invalid |= manifest.invalid
        return invalid

    def mean(self, invalid: Collection[int]) -> np.ndarray:
        """The mean feature over the valid rows of up to 1024 evenly spaced blocks, float32 [width]."""
        array, blocks = self.array(), self.dataset.blocks
        total, count = np.zeros(self.width), 0
        try:
            for b in np.unique(np.linspace(0, blocks - 1, min(blocks, 1024)).round().astype(int)):
                rows = np.arange(b * BLOCK, min((b + 1) * BLOCK, self.dataset.rows))
                block = array[int(rows[0]) : int(rows[-1]) + 1].read().result()
                valid = [r not in invalid for r in rows.tolist()]
                total += block[valid].astype(np.float64).sum(axis=0)
                count += sum(valid)
        except ValueError as error:
            raise read_error(self.path, error) from None
        return (total / max(count, 1)).astype(np.float32)

    def read_all(self) -> np.ndarray:
        """All features as one `[rows, width]` bfloat16 array in memory."""
        array = self.array()
        out = np.empty((self.dataset.rows, self.width), BFLOAT16)
        target = ts.array(out)
        starts = range(0, self.dataset.rows, BLOCK)
        ends = [min(lo + BLOCK, self.dataset.rows) for lo in starts]
        try:
            futures = [target[lo:hi].write(array[lo:hi]) for lo, hi in zip(starts, ends, strict=True)]
            for future in futures:
                future.result()
        except ValueError as error:
            raise read_error(self.path, error) from None
        return out


def embed_command(dataset: Dataset, tower: dict[str, Any], name: str) -> str:
    """The command that embeds a dataset with a tower: every option that is part of the identity."""
    options = {
        "--tower": tower["source"],
        "--name": name,
        "--preprocess": tower["preprocess"]["method"],
        "--resolution": str(tower["preprocess"]["size"]),
        "--gelu": tower["gelu"],
        "--dtype": tower["dtype"],
    }
    words = (word for pair in options.items() for word in pair)
    return shlex.join(["lit-fast", "embed", str(dataset.path), *words])


def read_error(path: Path, error: Exception) -> UserError:
    """A TensorStore read error as one line that says what to do."""
    return UserError(f"{path} cannot be read, a shard is missing or damaged: {str(error).splitlines()[0]}")


def _metadata(rows: int, width: int) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "shape": [rows, width],
        "data_type": "bfloat16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD, width]}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [BLOCK, width],
                    "codecs": [little, {"name": "crc32c"}],
                    "index_codecs": [little, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
    }


def stored_towers(dataset: Dataset) -> list[str]:
    """Names of the towers that have a feature directory in the dataset, sorted."""
    root = dataset.path / "features"
    return sorted(p.parent.name for p in root.glob("*/tower.json"))


def open_features(dataset: Dataset, tower: str = "") -> Features:
    """Open the features of `tower`; with an empty name, of the only tower there is.

    Raises:
      UserError: the dataset has no such features, or several and no name was given.
    """
    have = stored_towers(dataset)
    remedy = f"make them with: lit-fast embed {dataset.path} --tower NAME_OR_FILE"
    if not have:
        raise UserError(f"dataset {dataset.path} has no features; {remedy}")
    if not tower and len(have) > 1:
        raise UserError(
            f"dataset {dataset.path} has features of {', '.join(have)}; say which with the key tower"
        )
    tower = tower or have[0]
    if tower not in have:
        raise UserError(
            f"dataset {dataset.path} has no features of tower {tower!r}, only of {', '.join(have)}; {remedy}"
        )
    file = dataset.path / "features" / tower / "tower.json"
    return Features(dataset, tower, read_object(file, "name", "source", "identity", "width"))
