"""The features of one tower over one dataset: `[rows, views * width]` bfloat16 in TensorStore.

    D/features/<tower>/tower.json            provenance: how to make the same vectors again
    D/features/<tower>/zarr.json, c/...      zarr3, shards of 65 536 rows, blocks of 1024, crc32c
    D/features/<tower>/manifest/00000.json   one per finished shard, written last
    D/features/<tower>/few_shot/             figures, see `lit_fast.evaluation.few_shot`

A shard exists when its manifest exists. Features are the tower's pooled output, not normalised. Where a
tower saw several views (crops) of an image, their vectors lie side by side; view 0 is the image as the
tower's own preprocessing takes it, and the only one in most stores.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from lit_fast.data.dataset import BLOCK, SHARD, Dataset
from lit_fast.errors import UserError
from lit_fast.storage.files import exists, is_file, list_names, read_json, read_object, write_json
from lit_fast.storage.paths import absolute, join, stem

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
    features: str = ""  # `features_digest` of the shard; older stores have none


@dataclass(frozen=True)
class Features:
    """A feature store, perhaps unfinished."""

    dataset: Dataset
    tower: str  # the name in the path
    provenance: dict[str, Any]  # tower.json

    @property
    def path(self) -> str:
        """`D/features/<tower>`."""
        return join(self.dataset.path, "features", self.tower)

    @property
    def width(self) -> int:
        """Length of one feature vector."""
        return int(self.provenance["width"])

    @property
    def views(self) -> int:
        """Vectors per row."""
        return int(self.provenance.get("views", 1))

    @property
    def identity(self) -> str:
        """Digest of everything that decides the vectors."""
        return str(self.provenance["identity"])

    def shard_rows(self, shard: int) -> int:
        """Rows of a shard; the last may be short."""
        return min(SHARD, self.dataset.rows - shard * SHARD)

    def array(self, *, create: bool = False) -> ts.TensorStore:
        """The `[rows, views * width]` bfloat16 array; a missing block is an error, never zeros.

        `create` makes it where there is none, and longer where the dataset has grown.

        Raises:
          UserError: it cannot be opened, or is not such an array.
        """
        shape = [self.dataset.rows, self.views * self.width]
        wanted = _metadata(shape[1])
        created = exists(join(self.path, "zarr.json"))
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{absolute(self.path)}/"},  # it takes no path with ..
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
            "metadata": wanted if created else {**wanted, "shape": shape},
        }
        try:
            array = ts.open(spec, context=_CONTEXT, open=True, create=create and not created).result()
            if create and array.shape[0] < shape[0]:
                array = array.resize(exclusive_max=shape, expand_only=True).result()
        except ValueError as error:
            raise UserError(f"{self.path} cannot be opened: {first_line(error)}") from None
        if list(array.shape) != shape:
            raise UserError(
                f"{self.path} has {array.shape[0]:,} rows, {self.dataset.path} has {shape[0]:,}; {self._remedy()}"
            )
        return array

    def shard_path(self, shard: int) -> str:
        """The file with the features of a shard."""
        return join(self.path, "c", str(shard), "0")

    def manifest_path(self, shard: int) -> str:
        """Where the manifest of a shard lies."""
        return join(self.path, "manifest", f"{shard:05d}.json")

    def finished(self) -> list[int]:
        """Shards that are complete, in order: with a manifest that knows all rows the shard has now."""
        return [shard for shard, m in self.manifests().items() if m.rows >= self.shard_rows(shard)]

    def manifests(self) -> dict[int, Manifest]:
        """All manifests by shard, in order; nothing is read per row.

        Raises:
          UserError: one is damaged.
        """
        names = (stem(n) for n in list_names(join(self.path, "manifest")) if n.endswith(".json"))
        shards = sorted(int(n) for n in names if n.isdigit() and int(n) < self.dataset.shards)
        return {shard: self.manifest(shard) for shard in shards}

    def manifest(self, shard: int) -> Manifest:
        """Read one shard's manifest.

        Raises:
          UserError: it is missing or damaged.
        """
        path = self.manifest_path(shard)
        mend = f"mend it with: lit-fast verify {self.dataset.path} --tower {self.tower} --repair"
        try:
            value = read_json(path)
            value["invalid"] = {int(row): str(why) for row, why in value["invalid"].items()}
            manifest = Manifest(**value)
            if manifest.shard != shard or manifest.first != shard * SHARD:
                raise ValueError("it is of another shard")
            if type(manifest.rows) is not int or not 0 < manifest.rows <= SHARD:
                raise ValueError(f"rows {manifest.rows}")
            return manifest
        except UserError as error:
            raise UserError(f"{error}; {mend}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}; {mend}") from None

    def write_manifest(self, manifest: Manifest) -> None:
        """Declare a shard complete; call it only after its data are on the disk."""
        value = manifest.__dict__ | {"invalid": {str(r): why for r, why in sorted(manifest.invalid.items())}}
        if not manifest.features:
            del value["features"]
        write_json(self.manifest_path(manifest.shard), value)

    def invalid_rows(self) -> dict[int, str]:
        """Rows without a usable feature, from all shards.

        Also the one check of the join: every shard must be complete and belong to these rows and to this
        tower.

        Raises:
          UserError: a shard is missing or was made from other rows or by another tower.
        """
        manifests = self.manifests()
        missing = sorted(set(range(self.dataset.shards)) - set(manifests))
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {self.dataset.shards} shards are missing (first: {missing[0]}); "
                + self._remedy()
            )
        invalid: dict[int, str] = {}
        for shard, manifest in manifests.items():
            if manifest.rows < self.shard_rows(shard):
                raise UserError(
                    f"{self.path}: the dataset has grown, shard {shard} has {manifest.rows:,} of "
                    f"{self.shard_rows(shard):,} rows; {self._remedy()}"
                )
            if manifest.keys != self.dataset.shard_keys[shard]:
                raise UserError(
                    f"{self.path}: shard {shard} was made from other rows than {self.dataset.path}"
                )
            if manifest.rows != self.shard_rows(shard):
                raise UserError(
                    f"{self.path}: shard {shard} has {manifest.rows} rows, {self.dataset.path} has others"
                )
            if manifest.tower != self.identity:
                raise UserError(f"{self.path}: shard {shard} was made by another tower than tower.json says")
            invalid |= manifest.invalid
        return invalid

    def _remedy(self) -> str:
        return f"finish them with: {embed_command(self.dataset, self.provenance, self.tower)}"

    def mean(self, invalid: Collection[int]) -> np.ndarray:
        """The mean feature over the valid rows of up to 1024 evenly spaced blocks, float32 [width].

        Of view 0 alone: that is what evaluation and retrieval subtract it from.
        """
        array, blocks = self.array(), self.dataset.blocks
        total, count = np.zeros(self.width), 0
        try:
            for b in np.unique(np.linspace(0, blocks - 1, min(blocks, 1024)).round().astype(int)):
                rows = np.arange(b * BLOCK, min((b + 1) * BLOCK, self.dataset.rows))
                block = array[int(rows[0]) : int(rows[-1]) + 1, : self.width].read().result()
                valid = [r not in invalid for r in rows.tolist()]
                total += block[valid].astype(np.float64).sum(axis=0)
                count += sum(valid)
        except ValueError as error:
            raise read_error(self.path, error) from None
        return (total / max(count, 1)).astype(np.float32)

    def read_all(self, views: int = 1) -> np.ndarray:
        """The first `views` views of all rows as one `[rows, views * width]` bfloat16 array in memory."""
        array, width = self.array(), views * self.width
        out = np.empty((self.dataset.rows, width), BFLOAT16)
        target = ts.array(out)
        starts = range(0, self.dataset.rows, BLOCK)
        ends = [min(lo + BLOCK, self.dataset.rows) for lo in starts]
        try:
            futures = [target[lo:hi].write(array[lo:hi, :width]) for lo, hi in zip(starts, ends, strict=True)]
            for future in futures:
                future.result()
        except ValueError as error:
            raise read_error(self.path, error) from None
        return out


def with_views(tower: dict[str, Any], views: int) -> dict[str, Any]:
    """`tower.json` of a tower that sees `views` views of every image; of one view it stays as it is.

    `first_view` keeps the identity of the tower that makes view 0 alone.
    """
    if views == 1:
        return tower
    first = tower["identity"]
    identity = hashlib.blake2b(f"{first} views {views}".encode(), digest_size=16).hexdigest()
    return tower | {"identity": identity, "first_view": first, "views": views}


def first_view(tower: dict[str, Any]) -> str:
    """Identity of the tower that makes view 0; equal ones make the same vectors of it."""
    return str(tower.get("first_view", tower["identity"]))


def features_digest(features: np.ndarray) -> str:
    """Digest of bfloat16 `[n, width]` features."""
    return hashlib.blake2b(np.ascontiguousarray(features).view(np.uint8).data, digest_size=16).hexdigest()


def embed_command(dataset: Dataset, tower: dict[str, Any], name: str) -> str:
    """The command that embeds a dataset with a tower: every option that is part of the identity.

    Of imported features, the one that imported them.
    """
    if "imported" in tower:
        told = {name: tower["imported"].get(name, "") for name in ("format", "captions_table", "captions")}
        options = {"out": dataset.path, "tower": tower["name"]} | told
        return _command("import-features", tower["source"], options)
    options = {"tower": tower["source"], "name": name} | tower_options(tower)
    options |= {"dtype": tower["dtype"]}
    if tower.get("views", 1) > 1:
        options["views"] = tower["views"]
    return _command("embed", str(dataset.path), options)


def _command(name: str, argument: str, options: dict[str, Any]) -> str:
    words: list[str] = []
    for option, value in options.items():
        if value != "":
            words += [f"--{option.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(["lit-fast", name, argument, *words])


def tower_options(tower: dict[str, Any]) -> dict[str, Any]:
    """The options of `lit-fast embed` that made a tower differ from its default.

    Older stores do not record them; their towers had three, which are spelled out.
    """
    if "options" in tower:
        return dict(tower["options"])
    preprocess = tower["preprocess"]
    return {"preprocess": preprocess["method"], "resolution": preprocess["size"], "gelu": tower["gelu"]}


def read_error(path: str, error: Exception) -> UserError:
    """A TensorStore read error as one line that says what to do."""
    return UserError(
        f"{path} cannot be read, a shard is missing or damaged: {first_line(error)}; lit-fast verify --repair "
        "finds and mends it"
    )


def first_line(error: Exception) -> str:
    """What TensorStore says, without the details in brackets and the stack."""
    return re.sub(r" \[\w+=.*", "", str(error).splitlines()[0])


def _metadata(width: int) -> dict[str, Any]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
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
    folder = join(dataset.path, "features")
    return [name for name in list_names(folder) if is_file(join(folder, name, "tower.json"))]


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
    file = join(dataset.path, "features", tower, "tower.json")
    provenance = read_object(
        file, "name", "source", "identity", "width", "dtype",
        name=str, source=str, identity=str, width=int, views=int, dtype=str, preprocess=dict, options=dict,
        imported=dict,
    )  # fmt: skip
    return Features(dataset, tower, provenance)


def matching_features(dataset: Dataset, tower: dict[str, Any]) -> Features:
    """The dataset's features of exactly this tower; how many more views either has does not matter.

    Raises:
      UserError: there are none.
    """
    have = [open_features(dataset, name) for name in stored_towers(dataset)]
    for features in have:
        if first_view(features.provenance) == first_view(tower):
            return features
    named = (
        f" but {', '.join(f.tower for f in have)}, of other weights, preprocessing or dtype" if have else ""
    )
    name = tower["name"]
    if "imported" in tower:
        raise UserError(
            f"dataset {dataset.path} has no features of the run's tower {name}{named}, which were imported; bring the "
            f"same model's: lit-fast import-features SOURCE --out D --tower {name} --format FORMAT"
        )
    while name in stored_towers(dataset):
        name += "-2"
    raise UserError(
        f"dataset {dataset.path} has no features of the run's tower {tower['name']}{named}; make them with: "
        + embed_command(dataset, tower | {"views": 1}, name)
    )


def rows_without_features(dataset: Dataset, tower: dict[str, Any]) -> set[int]:
    """The rows that `image_embeddings` leaves out; errors as for `matching_features`."""
    return set(matching_features(dataset, tower).invalid_rows())
