"""The training pass of the text tower: the embeddings of a device's captions, differentiable by the parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.config import TextConfig
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import Params, embed_ids
from lit_fast.runtime import AXIS

DeviceBatch = dict[str, jax.Array]


def embed_texts(
    model: TextTower, text: TextConfig, params: Params, batch: DeviceBatch, key: jax.Array
) -> jax.Array:
    """Embed this device's captions in their order, normalized, float32 [n * captions, width].

    Dropout of a row depends on `key` and the row's position in the global batch. So neither microbatches nor, where a
    row is one caption, the number of devices change it.
    """
    rows = {name: array for name, array in batch.items() if name in ("ids", "lengths")}
    if text.dropout:
        positions = lax.axis_index(AXIS) * len(batch["ids"]) + jnp.arange(len(batch["ids"]))
        rows["dropout_keys"] = jax.vmap(partial(jax.random.fold_in, key))(positions)
    embed = partial(embed_ids, model, params)
    texts = map_microbatches(embed, rows, text.microbatches, recompute=text.keep == "embeddings")
    return texts[batch["slots"]] if "slots" in batch else texts


def map_microbatches(
    function: Callable[..., jax.Array], inputs: dict[str, jax.Array], microbatches: int, recompute: bool
) -> jax.Array:
    """Apply `function(**inputs)` to equal parts of the inputs, one after another.

    Args:
      function: from arrays [rows, ...] to an array [outputs, ...], each output of one row.
      inputs: arrays [n, ...]; n is divisible by `microbatches`.
      microbatches: number of parts.
      recompute: store no residuals of a part; its backward pass computes the part again (GradCache).

    Returns:
      The outputs of all parts, concatenated.
    """
    if recompute:
        function = jax.checkpoint(function)
    if microbatches == 1:
        return function(**inputs)
    parts = jax.tree.map(lambda a: a.reshape(microbatches, -1, *a.shape[1:]), inputs)
    outputs = lax.map(lambda part: function(**part), parts)
    return outputs.reshape(-1, *outputs.shape[2:])
