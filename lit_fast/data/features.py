"""The features of one tower over one dataset: `[rows, views * width]` bfloat16.

    D/features/<tower>/tower.json            provenance: how to compute the same vectors again
    D/features/<tower>/zarr.json, c/...      the array, see `lit_fast.data.shards`
    D/features/<tower>/manifest/00000.json   one per finished shard, written last
    D/features/<tower>/few_shot/             cached results, see `lit_fast.evaluation.few_shot`
    D/features/<tower>/neighbours/           nearest neighbours of each row, see `lit_fast.data.neighbours`

A shard exists when its manifest exists. Features are the tower's pooled output, not normalized. If the tower was
applied to several views (crops) of each image, a row holds their vectors one after the other; view 0 is the image as
the tower's own preprocessing takes it, and the only one in most stores.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from lit_fast.data.dataset import BLOCK, SHARD, Dataset, choose_store
from lit_fast.data.shards import (
    BlockReader,
    array_metadata,
    read_threads,
    run_blocks,
    shard_file,
    tensorstore_reason,
)
from lit_fast.errors import UserError
from lit_fast.storage.atomic import version, write_atomic, write_if_unchanged
from lit_fast.storage.files import exists, is_file, list_names
from lit_fast.storage.paths import join, stem
from lit_fast.storage.text_files import json_bytes, read_json, read_object

if TYPE_CHECKING:
    import tensorstore as ts

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_IMPORT_OPTIONS = ("format", "features", "captions_table", "captions", "key")  # of import-features

_MEAN_BLOCKS = 1024  # blocks that the mean is computed over


@dataclass(frozen=True)
class Manifest:
    """The record of one finished shard."""

    shard: int
    first: int  # first row
    rows: int
    keys: str  # digest of the rows' keys, as in dataset.json
    tower: str  # identity in tower.json
    invalid: dict[int, str]  # row -> why its image could not be decoded; its feature is zero
    features: str = ""  # `features_digest` of the shard; "": not recorded


@dataclass(frozen=True)
class Features:
    """A feature store, which may be unfinished."""

    dataset: Dataset
    tower: str  # name of the directory
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
    def row_bytes(self) -> int:
        """Memory of the vectors of one row."""
        return 2 * self.views * self.width

    @property
    def identity(self) -> str:
        """Digest of everything that the vectors depend on."""
        return str(self.provenance["identity"])

    def array(self, *, create: bool = False) -> ts.TensorStore:
        """Open the `[rows, views * width]` bfloat16 array. A missing block is an error and does not read as zeros.

        With `create` the array is created if there is none, and extended if the dataset has grown.

        Raises:
          UserError: it cannot be opened, or has another shape or type.
        """
        import tensorstore as ts  # most commands do not need it

        from lit_fast.storage.arrays import array_context, array_location

        shape = [self.dataset.rows, self.views * self.width]
        metadata = array_metadata(shape[1])
        created = exists(join(self.path, "zarr.json"))
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": array_location(self.path),
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
            "metadata": metadata if created else {**metadata, "shape": shape},
        }
        try:
            array = ts.open(spec, context=array_context(), open=True, create=create and not created).result()
            if create and array.shape[0] < shape[0]:
                array = array.resize(exclusive_max=shape, expand_only=True).result()
        except ValueError as error:
            raise UserError(
                f"{self.path} cannot be opened: {tensorstore_reason(error)}; {self._remedy()}"
            ) from None
        if list(array.shape) != shape:
            raise UserError(
                f"{self.path} has {array.shape[0]:,} rows, {self.dataset.path} has {shape[0]:,}; {self._remedy()}"
            )
        return array

    def block_reader(self) -> BlockReader:
        """Return a reader of whole blocks."""
        return BlockReader(self.path, self.dataset.rows)

    def read_all(self, views: int = 1) -> np.ndarray:
        """Read the first `views` views of all rows, bfloat16 `[rows, views * width]`.

        Raises:
          UserError: a shard is missing or damaged.
        """
        self.array()  # checks shape and type
        reader, width, stored_width = self.block_reader(), views * self.width, self.views * self.width
        out = np.empty((self.dataset.blocks, BLOCK, width), BFLOAT16)
        count = run_blocks(self.path, stored_width)
        shard_blocks = SHARD // BLOCK
        runs = [
            slice(first, min(first + count, end))
            for start in range(0, self.dataset.blocks, shard_blocks)
            for end in [min(start + shard_blocks, self.dataset.blocks)]
            for first in range(start, end, count)
        ]

        def read(run: slice) -> None:
            if width == stored_width:
                reader.read_run(run.start, out[run])
                return
            buffer = np.empty((run.stop - run.start, BLOCK, stored_width), BFLOAT16)
            reader.read_run(run.start, buffer)
            out[run] = buffer[..., :width]

        with ThreadPoolExecutor(read_threads(self.path)) as pool:
            for _ in pool.map(read, runs):
                pass
        return out.reshape(-1, width)[: self.dataset.rows]

    def mean(self, invalid: Collection[int]) -> np.ndarray:
        """Return the mean of view 0 over the valid rows of up to 1024 evenly spaced blocks, float32 [width].

        Raises:
          UserError: a shard is missing or damaged.
        """
        self.array()  # checks shape and type
        reader, blocks, rows = self.block_reader(), self.dataset.blocks, self.dataset.rows
        sample = np.unique(np.linspace(0, blocks - 1, min(blocks, _MEAN_BLOCKS)).round().astype(int)).tolist()

        def add_up(block: int) -> tuple[np.ndarray, int]:
            vectors = np.empty((BLOCK, self.views * self.width), BFLOAT16)
            reader.read(block, vectors)
            first = block * BLOCK
            valid = [row - first for row in range(first, min(first + BLOCK, rows)) if row not in invalid]
            return vectors[valid, : self.width].astype(np.float64).sum(axis=0), len(valid)

        with ThreadPoolExecutor(read_threads(self.path)) as pool:
            sums, counts = zip(*pool.map(add_up, sample), strict=True)
        return (np.sum(sums, axis=0) / max(sum(counts), 1)).astype(np.float32)

    def shard_rows(self, shard: int) -> int:
        """Return the number of rows of a shard; the last may be short."""
        return min(SHARD, self.dataset.rows - shard * SHARD)

    def shard_path(self, shard: int) -> str:
        """Return the location of the features of a shard."""
        return shard_file(self.path, shard)

    def manifest_path(self, shard: int) -> str:
        """Return the location of the manifest of a shard."""
        return join(self.path, "manifest", f"{shard:05d}.json")

    def finished(self) -> list[int]:
        """Return the complete shards in order: those whose manifest covers all rows that the shard has now."""
        return [shard for shard, m in self.manifests().items() if m.rows >= self.shard_rows(shard)]

    def is_finished(self, shard: int) -> bool:
        """Return whether the manifest of a shard covers all rows that the shard has now."""
        if version(self.manifest_path(shard)) is None:
            return False
        return self.manifest(shard).rows >= self.shard_rows(shard)

    def manifests(self) -> dict[int, Manifest]:
        """Read all manifests, by shard in order.

        Raises:
          UserError: a manifest is damaged.
        """
        names = (stem(name) for name in list_names(join(self.path, "manifest")) if name.endswith(".json"))
        shards = sorted(int(n) for n in names if n.isdigit() and int(n) < self.dataset.shards)
        with ThreadPoolExecutor(read_threads(self.path)) as pool:  # in a bucket each is a request
            return dict(zip(shards, pool.map(self.manifest, shards), strict=True))

    def manifest(self, shard: int) -> Manifest:
        """Read the manifest of a shard.

        Raises:
          UserError: it is missing or damaged.
        """
        path = self.manifest_path(shard)
        remedy = f"repair it with: lit-fast verify {self.dataset.path} --tower {self.tower} --repair"
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
            raise UserError(f"{error.problem}; {remedy}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__} {error}; {remedy}") from None

    def write_manifest(self, manifest: Manifest) -> None:
        """Declare a shard complete. Call it after the features of the shard are flushed to disk."""
        write_atomic(self.manifest_path(manifest.shard), self._encode(manifest))

    def replace_manifest(self, manifest: Manifest, version: bytes | None) -> bool:
        """Write the manifest of a shard, unless the stored one has another version; return whether it was written.

        Args:
          version: of the stored one, None if there is none, see `lit_fast.storage.atomic.version`.
        """
        return write_if_unchanged(self.manifest_path(manifest.shard), self._encode(manifest), version)

    def _encode(self, manifest: Manifest) -> bytes:
        value = manifest.__dict__ | {"invalid": {str(r): why for r, why in sorted(manifest.invalid.items())}}
        if not manifest.features:
            del value["features"]
        return json_bytes(value)

    def invalid_rows(self) -> dict[int, str]:
        """Return the rows without a usable feature and the reasons.

        Checks also that every shard is complete and belongs to the rows of this dataset and to this tower.

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
            rows = self.shard_rows(shard)
            if manifest.rows < rows:
                raise UserError(
                    f"{self.path}: the dataset has grown, shard {shard} has {manifest.rows:,} of {rows:,} rows; "
                    + self._remedy()
                )
            if manifest.keys != self.dataset.shard_keys[shard] or manifest.rows != rows:
                raise UserError(
                    f"{self.path}: shard {shard} was made from other rows than {self.dataset.path}; delete it and "
                    + self._remedy()
                )
            if manifest.tower != self.identity:
                raise UserError(
                    f"{self.path}: shard {shard} was made by another tower than its tower.json; delete it and "
                    + self._remedy()
                )
            invalid |= manifest.invalid
        return invalid

    def _remedy(self) -> str:
        return f"finish them with: {embed_command(self.dataset, self.provenance, self.tower)}"


def features_digest(features: np.ndarray) -> str:
    """Return the digest of bfloat16 `[n, width]` features."""
    return hashlib.blake2b(np.ascontiguousarray(features).view(np.uint8).data, digest_size=16).hexdigest()


def stored_towers(dataset: Dataset) -> list[str]:
    """Return the names of the towers that have a feature store in the dataset, sorted."""
    directory = join(dataset.path, "features")
    return [name for name in list_names(directory) if is_file(join(directory, name, "tower.json"))]


def open_features(dataset: Dataset, tower: str = "") -> Features:
    """Open the features of `tower`; with an empty name, those of the only tower.

    Raises:
      UserError: the dataset has no such features, or several and no name was given.
    """
    command = f"lit-fast embed {dataset.path} --tower NAME_OR_FILE"
    tower = choose_store(dataset, "features", "tower", tower, stored_towers(dataset), command)
    provenance = read_object(
        join(dataset.path, "features", tower, "tower.json"), "name", "source", "identity", "width", "dtype",
        name=str, source=str, identity=str, width=int, views=int, dtype=str, preprocess=dict, options=dict,
        imported=dict,
    )  # fmt: skip
    return Features(dataset, tower, provenance)


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
            f"those of the same model: lit-fast import-features SOURCE --out D --tower {name}"
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


def tower_options(tower: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `lit-fast embed` that make a tower differ from its default, of a `tower.json`."""
    return dict(tower.get("options", {}))


def embed_command(dataset: Dataset, tower: dict[str, Any], name: str) -> str:
    """Return the command that makes features `name` with a tower, with all options that its identity depends on."""
    if "imported" in tower:
        recorded = tower["imported"]
        imported = {key: str(recorded[key]) for key in _IMPORT_OPTIONS if key in recorded}
        options = {"out": dataset.path, "tower": tower["name"]} | imported
        sources = recorded.get("sources", [tower["source"]])
        return _command("import-features", *map(str, sources), options=options)
    options = {"tower": tower["source"], "name": name} | tower_options(tower) | {"dtype": tower["dtype"]}
    if tower.get("views", 1) > 1:
        options["views"] = tower["views"]
    return _command("embed", dataset.path, options=options)


def _command(name: str, *arguments: str, options: dict[str, Any]) -> str:
    words: list[str] = []
    for option, value in options.items():
        words += [f"--{option.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(["lit-fast", name, *arguments, *words])
