"""Fold parts of a model that other code bases lack into weights that they have.

lit_fast subtracts the mean feature before the image head, may have no image head, and may factorise the token table.
"""

from __future__ import annotations

import numpy as np

from lit_fast.inference.model import Model
from lit_fast.towers.tower import Tower
from lit_fast.train.export.vision_tower import own_vit
from lit_fast.weights.parameters import Params


def image_head(model: Model) -> np.ndarray:
    """Return the kernel of the image head; the identity if the model has none.

    Returns:
      float32 [width, width].
    """
    if "img" not in model.params:
        return np.eye(model.width, dtype=np.float32)
    return np.asarray(model.params["img"]["head"]["kernel"])


def image_projection(model: Model) -> np.ndarray:
    """Return the tower's own projection, if it has one, times the image head.

    Returns:
      float32 [encoder width, width].
    """
    head = image_head(model)
    if own_vit(model).architecture.pool != "projection":
        return head
    return np.asarray(own_vit(model).params["projection"]["kernel"]) @ head


def centered_norm(tower: Tower, mean: np.ndarray) -> Params:
    """Return the LayerNorm before the pooled feature with centring in its bias.

    The bias subtracts `mean` [width] from the feature. If the feature is projected, the bias subtracts a vector that
    the projection maps to `mean`. Such a vector exists, since a projection does not raise the number of dimensions.
    """
    norm = tower.params.get("pooled_norm") or tower.params["Transformer"]["encoder_norm"]
    shift: np.ndarray = np.asarray(mean, np.float64)
    if tower.architecture.pool == "projection":
        kernel = np.asarray(tower.params["projection"]["kernel"], np.float64)
        shift = np.linalg.lstsq(kernel.T, shift, rcond=None)[0]
    return {"scale": norm["scale"], "bias": (norm["bias"] - shift).astype(np.float32)}


def centered_map_head(head: Params, mean: np.ndarray) -> Params:
    """Return a MAP head whose last bias subtracts `mean` [width] from its output."""
    last = head["MlpBlock_0"]["Dense_1"]
    block = head["MlpBlock_0"] | {"Dense_1": last | {"bias": last["bias"] - np.asarray(mean)}}
    return head | {"MlpBlock_0": block}


def with_token_table(txt: Params) -> Params:
    """Return a text tower whose token table, if factorised, is multiplied out."""
    if "embedding_projection" not in txt:
        return txt
    table, projection = txt["Embed_0"]["embedding"], txt["embedding_projection"]["kernel"]
    table = (np.asarray(table, np.float64) @ np.asarray(projection, np.float64)).astype(np.float32)
    rest = {name: params for name, params in txt.items() if name != "embedding_projection"}
    return rest | {"Embed_0": {"embedding": table}}


def with_text_head(txt: Params) -> Params:
    """Return a text tower with a whole token table and a head.

    A tower without head gets the identity as its head.
    """
    txt = with_token_table(txt)
    if "head" in txt:
        return txt
    width = txt["pos_embedding"].shape[-1]
    return txt | {"head": {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}}
