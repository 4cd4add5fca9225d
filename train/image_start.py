"""The image tower that a run trains, and where it starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lit_fast.config import Config, ImageConfig
from lit_fast.data.dataset import Dataset
from lit_fast.data.features import Features, open_features, tower_options
from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture
from lit_fast.models.image_tower import ImageTower, image_tower
from lit_fast.models.sizes import VARIANTS
from lit_fast.towers.embed import open_tower
from lit_fast.towers.preprocess import Preprocess
from lit_fast.towers.tower import Tower, from_provenance
from lit_fast.weights.parameters import Params

_ARCH_SIZE = 224  # pixels


@dataclass(frozen=True)
class ImageStart:
    """The image tower of a run at its start.

    Attributes:
      record: the `tower.json` of the run: provenance of the tower, with "train" as in the configuration.
      preprocess: from the bytes of an image to pixels.
      params: float32 arrays of a pretrained tower; None: it starts from random weights.
      features: of the same tower, whose invalid rows are known; None: there are none.
    """

    record: dict[str, Any]
    preprocess: Preprocess
    params: Params | None
    features: Features | None

    def tower(self, config: ImageConfig) -> ImageTower:
        """Return the module of a configuration."""
        return image_tower(self.record, config)


def open_image_start(config: Config, dataset: Dataset) -> ImageStart:
    """Open the image tower of a configuration whose `image.train` is not "frozen".

    Raises:
      UserError: it cannot be loaded, or is no ViT of lit_fast's own code.
    """
    image, features = config.image, None
    if image.arch:
        tower = _new_tower(image)
    else:
        if not image.tower:
            features = _features_of_dataset(config, dataset)
        tower = _open_tower(image, features)
    record = tower.provenance(image.dtype) | {"train": image.train}
    same = features is not None and features.provenance["preprocess"] == record["preprocess"]
    params = tower.params if image.train == "unlocked" else None
    return ImageStart(record, tower.preprocess, params, features if same else None)


def _features_of_dataset(config: Config, dataset: Dataset) -> Features:
    """Return the features whose tower is to be trained."""
    try:
        features = open_features(dataset, config.tower)
    except UserError as error:
        raise UserError(f"{error}; or name a tower with image.tower") from None
    if features.provenance.get("architecture") != "vit":
        reason = "was imported" if "imported" in features.provenance else "is of another library"
        raise UserError(
            f"tower {features.tower} of {dataset.path} {reason} and cannot be trained; name a ViT with image.tower, "
            "see lit-fast towers"
        )
    return features


def _open_tower(image: ImageConfig, features: Features | None) -> Tower:
    """Open the tower of `image.tower`, or that of features, with the options of the configuration."""
    is_scratch = image.train == "scratch"
    given: dict[str, Any] = {
        "preprocess": image.preprocess,
        "resolution": image.resolution,
        "reduced_decode": image.reduced_decode,
    }
    if not is_scratch:  # their parameters need not exist in the file
        given |= {"pool": image.pool, "gelu": image.gelu}
    options = {name: value for name, value in given.items() if value}
    source = image.tower
    if features is not None:
        source = features.provenance["source"]
        options = tower_options(features.provenance) | options
    tower = open_tower(source, options | {"backend": "jax"})
    assert isinstance(tower, Tower)
    if not is_scratch:
        if features is not None and tower.sha256 != features.provenance["sha256"]:
            raise UserError(
                f"{source} has other weights than when {features.path} was made; restore it, or name it with "
                "image.tower"
            )
        return tower
    architecture = tower.architecture
    if image.gelu:
        architecture = replace(architecture, gelu=image.gelu)
    if image.pool:
        if image.pool == "projection" and not architecture.projection:
            raise UserError(
                f"image.pool projection does not fit {source}, which has none; choose tok, gap or map"
            )
        architecture = replace(
            architecture, pool=image.pool, class_token=architecture.class_token or image.pool == "tok"
        )
    return _without_weights(replace(tower, architecture=architecture))


def _new_tower(image: ImageConfig) -> Tower:
    """Make the tower of `image.arch`, as SigLIP's: attention pooling and tanh GELU by default."""
    variant, _, patch = image.arch.partition("/")
    size, pool = image.resolution or _ARCH_SIZE, image.pool or "map"
    if pool == "projection":
        raise UserError("image.pool projection is for towers that have one; choose tok, gap or map")
    if size % int(patch):
        raise UserError(
            f"image.resolution {size} is not a multiple of the patch size {patch}; use a multiple"
        )
    try:
        preprocess = Preprocess(image.preprocess or "tf-squash", size, size, reduced=image.reduced_decode)
    except ValueError as error:
        raise UserError(f"image.arch {image.arch}: {error}; set image.preprocess") from None
    architecture = Architecture(
        VARIANTS[variant], int(patch), pool, image.gelu or "tanh", class_token=pool == "tok"
    )
    return _without_weights(
        Tower(
            name=image.arch.replace("/", "_"),
            source=image.arch,
            sha256="",
            preprocess=preprocess,
            params={},
            architecture=architecture,
            resampled=None,
        )
    )


def _without_weights(tower: Tower) -> Tower:
    """Return a tower whose provenance says that it starts from random weights."""
    found = replace(tower, sha256="", params={}, resampled=None)
    from_provenance(found.provenance("float32"))  # checks the sizes
    return found
