"""A vision tower that centres its own features, in weights that other code bases have too.

`Model.embed_image` subtracts the mean feature and then applies the image head; the last bias before the
feature can do the first exactly.
"""

from __future__ import annotations

import numpy as np

from lit_fast.towers.tower import Tower
from lit_fast.weights.parameters import Params


def centered_norm(tower: Tower, mean: np.ndarray) -> Params:
    """The LayerNorm before a tower's pooled feature, whose bias takes `mean` [width] off the feature.

    Of a projected feature it takes off what the projection makes `mean` of, which exists since projections lead
    to no more dimensions than they come from.
    """
    norm = (
        tower.params["pooled_norm"]
        if "pooled_norm" in tower.params
        else tower.params["Transformer"]["encoder_norm"]
    )
    shift: np.ndarray = np.asarray(mean, np.float64)
    if tower.architecture.pool == "projection":
        kernel = np.asarray(tower.params["projection"]["kernel"], np.float64)
        shift = np.linalg.lstsq(kernel.T, shift, rcond=None)[0]
    return {"scale": norm["scale"], "bias": (norm["bias"] - shift).astype(np.float32)}


def centered_map_head(head: Params, mean: np.ndarray) -> Params:
    """A MAP head whose last bias takes `mean` [width] off its output."""
    last = head["MlpBlock_0"]["Dense_1"]
    block = head["MlpBlock_0"] | {"Dense_1": last | {"bias": last["bias"] - np.asarray(mean)}}
    return head | {"MlpBlock_0": block}
