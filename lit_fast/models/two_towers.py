"""The trained model: text tower, temperature, bias and image head as one parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lit_fast.config import Config, TextConfig
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.models.text_tower import TextTower
from lit_fast.runtime import batch_sharding, replicated
from lit_fast.utils.normalize import normalize

Params = dict[str, Any]
"""{"txt": the text tower, "t": log temperature [1], "b": bias [1], "mean": image mean [width],
"img": {"head": {"kernel": image head [width, width]}}}; "b" and "img" only where the loss has them."""

EMBED_BATCH = 512


def text_tower(config: TextConfig, tokenizer: Tokenizer, out_dim: int) -> TextTower:
    """The module that a configuration describes; `out_dim` is the features' width.

    Raises:
      UserError: without a head the two widths must agree.
    """
    width = config.shape.width
    if not config.head and width != out_dim:
        raise UserError(
            f"text.head = false needs a tower as wide as the features: set text.width = {out_dim} (it is {width}), "
            f"or text.head = true"
        )
    return TextTower(
        shape=config.shape,
        vocab_size=tokenizer.vocab_size,
        max_length=tokenizer.max_length,
        out_dim=out_dim,
        pooling=config.pooling,
        eos_id=tokenizer.eos_id if config.mask_padding else None,
        embedding_width=config.embedding_width,
        projected=config.head,
        dropout=config.dropout,
        keep=config.encoder_remat,
        pack=config.pack,
        dtype=jnp.dtype(config.dtype),
    )


def init_params(model: TextTower, config: Config, mean: np.ndarray) -> Params:
    """Fresh parameters with big_vision's names; `mean` is zero where images are not centred."""
    ids = jnp.zeros((1, model.max_length), jnp.int32)
    params: Params = {
        "txt": jax.jit(model.init)(jax.random.key(config.seed), ids)["params"],
        "t": jnp.log(jnp.full((1,), config.loss.temperature_init, jnp.float32)),
        "mean": jnp.asarray(mean, jnp.float32),
    }
    if config.loss.name == "sigmoid" and config.loss.bias:
        params["b"] = jnp.full((1,), config.loss.bias_init, jnp.float32)
    if config.loss.image_head:
        params["img"] = {"head": {"kernel": jnp.eye(len(mean), dtype=jnp.float32)}}
    return params


def embed_ids(
    model: TextTower,
    params: Params,
    ids: jax.Array,
    lengths: jax.Array | None = None,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """Normalised embeddings float32 [n, width] of ids integer [n, length]; `dropout` is a key, None: none.

    With `lengths` [n, k] a row holds k captions side by side, and there are n k embeddings.
    """
    rngs = None if dropout is None else {"dropout": dropout}
    texts = model.apply(
        {"params": params["txt"]}, ids.astype(jnp.int32), lengths, deterministic=dropout is None, rngs=rngs
    )
    return normalize(jnp.asarray(texts))


def text_embedder(
    model: TextTower, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[Params, Sequence[str]], np.ndarray]:
    """A function of (params, texts) to normalised float32 [n, width], compiled once, over all devices."""
    batch = -(-EMBED_BATCH // mesh.size) * mesh.size

    @partial(jax.jit, in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=replicated(mesh))
    def embed(params: Params, ids: jax.Array) -> jax.Array:
        return embed_ids(model, params, ids)

    def embed_text(params: Params, texts: Sequence[str]) -> np.ndarray:
        ids = tokenizer(texts)
        out = []
        for lo in range(0, len(ids), batch):
            part = ids[lo : lo + batch]
            padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
            # Of several processes each has all ids and gives its devices their part.
            dealt_ids = jax.make_array_from_callback(padded.shape, batch_sharding(mesh), padded.__getitem__)
            out.append(np.asarray(embed(params, dealt_ids))[: len(part)])
        return np.concatenate(out) if out else np.zeros((0, model.out_dim), np.float32)

    return embed_text


def centered(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Features [n, width], as they are stored, less `mean` and normalised, float32."""
    return normalize(features.astype(np.float32) - mean)


def apply_image_head(params: Params, images: np.ndarray) -> np.ndarray:
    """Normalised embeddings float32 [n, width] of centred and normalised features, by the head if there is one."""
    if "img" not in params:
        return images
    return normalize(images @ np.asarray(params["img"]["head"]["kernel"]))
