"""The trained model as one tree of parameters, and how it embeds."""

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
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.precision import resolve_dtype
from lit_fast.models.text_tower import TextTower
from lit_fast.runtime import batch_sharding, replicated
from lit_fast.utils.normalize import normalize

Params = dict[str, Any]
"""{"txt": the text tower, "t": log temperature [1], "b": bias [1], "mean": image mean [width],
"img": {"head": {"kernel": image head [width, width]}, ...: those of a trained image tower}}; "b" and "img" only where
the model has them."""

EMBED_BATCH = 512


def text_tower(config: TextConfig, tokenizer: Tokenizer, out_dim: int) -> TextTower:
    """Make the module of a configuration; `out_dim` is the width of the features.

    Raises:
      UserError: there is no head and the widths differ.
    """
    width = config.shape.width
    if not config.head and width != out_dim:
        raise UserError(
            f"text.head = false needs a text tower as wide as the features; set text.width = {out_dim} (it is "
            f"{width}), or text.head = true"
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
        pack=config.pack,
        dtype=jnp.dtype(resolve_dtype(config.dtype)),
    )


def init_params(
    model: TextTower, config: Config, mean: np.ndarray, image: ImageTower | None = None
) -> Params:
    """Initialize the parameters.

    Args:
      model: the text tower.
      config: of the run.
      mean: float32 [width], is subtracted from image features; zero for no centering.
      image: the image tower, if it is trained.
    """
    ids = jnp.zeros((1, model.max_length), jnp.int32)
    params: Params = {
        "txt": jax.jit(model.init)(jax.random.key(config.seed), ids)["params"],
        "t": jnp.log(jnp.full((1,), config.loss.temperature_init, jnp.float32)),
        "mean": jnp.asarray(mean, jnp.float32),
    }
    if config.loss.name == "sigmoid" and config.loss.bias:
        params["b"] = jnp.full((1,), config.loss.bias_init, jnp.float32)
    img: Params = {}
    if image is not None:
        img |= image.init(jax.random.fold_in(jax.random.key(config.seed), 1))
    if config.loss.image_head:
        img["head"] = {"kernel": jnp.eye(len(mean), dtype=jnp.float32)}
    return params | ({"img": img} if img else {})


def image_tower_params(params: Params) -> Params:
    """Return the parameters of a trained image tower; empty where it is frozen."""
    return {name: p for name, p in params.get("img", {}).items() if name != "head"}


def without_image_tower(params: Params) -> Params:
    """Return the parameters beside those of a trained image tower."""
    rest = {name: p for name, p in params.items() if name != "img"}
    return rest | ({"img": {"head": params["img"]["head"]}} if image_head(params) is not None else {})


def image_head(params: Params) -> Any:
    """Return the kernel of the image head, float32 [width, width]; None if the model has none."""
    return params["img"]["head"]["kernel"] if "head" in params.get("img", {}) else None


def embed_ids(
    model: TextTower,
    params: Params,
    ids: jax.Array,
    lengths: jax.Array | None = None,
    dropout_keys: jax.Array | None = None,
) -> jax.Array:
    """Embed token ids, normalized; arguments as of `TextTower.__call__`.

    Returns:
      float32 [n, width]; with `lengths` [n k, width].
    """
    texts = model.apply({"params": params["txt"]}, ids.astype(jnp.int32), lengths, dropout_keys)
    return normalize(jnp.asarray(texts))


def text_embedder(
    model: TextTower, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[[Params, Sequence[str]], np.ndarray]:
    """Return a function (params, texts) -> normalized float32 [n, width], compiled once for all devices."""
    batch_size = -(-EMBED_BATCH // mesh.size) * mesh.size
    sharding = batch_sharding(mesh)

    @partial(jax.jit, in_shardings=(replicated(mesh), sharding), out_shardings=replicated(mesh))
    def embed(params: Params, ids: jax.Array) -> jax.Array:
        return embed_ids(model, params, ids)

    def embed_texts(params: Params, texts: Sequence[str]) -> np.ndarray:
        ids = tokenizer(texts)
        out = []
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            padded = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
            # Every process has all ids; each of its devices takes its shard.
            sharded = jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)
            out.append(np.asarray(embed(params, sharded))[: len(batch)])
        return np.concatenate(out) if out else np.zeros((0, model.out_dim), np.float32)

    return embed_texts


def centered(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Subtract `mean` from stored features [n, width] and normalize them, float32."""
    return normalize(features.astype(np.float32) - mean)


def apply_image_head(params: Params, images: np.ndarray) -> np.ndarray:
    """Apply the image head, if any, to centred and normalized features float32 [n, width]; normalized."""
    head = image_head(params)
    return images if head is None else normalize(images @ np.asarray(head))
