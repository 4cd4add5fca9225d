"""One training step, compiled for a mesh."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lit_fast.config import Config, LossConfig, TextConfig
from lit_fast.losses.accumulate import Trained
from lit_fast.losses.contrastive import pair_loss
from lit_fast.losses.logit_stats import Logits, logit_metrics
from lit_fast.losses.pairs import pair_up
from lit_fast.models.text_tower import TextTower, unpacked
from lit_fast.models.two_towers import Params, embed_ids, init_params
from lit_fast.runtime import AXIS, REPLICATED, SHARDED, batch_sharding, replicated, shard_map
from lit_fast.train.optimizer import make_optimizer, make_schedule
from lit_fast.utils.normalize import normalize

Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    opt: Any
    step: jax.Array  # int32 [], completed updates
    bad_step: jax.Array  # int32 [], the first step whose loss or gradient was not finite; -1: none
    average: Params  # exponential moving average of the parameters; empty where none is kept


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, averaged: bool = False
) -> State:
    """The state before the first step, on every device."""

    make = partial(_initial_state, optimizer, averaged)
    return jax.jit(make, out_shardings=replicated(mesh))(params)


def abstract_training(model: TextTower, config: Config) -> tuple[optax.GradientTransformation, State]:
    """Build the optimizer, and the training state as shapes and dtypes, without computing anything.

    Raises:
      UserError: a rule of the optimizer matches no parameter.
    """
    params = jax.eval_shape(lambda: init_params(model, config, np.zeros(model.out_dim)))
    optimizer = make_optimizer(config.optimizer, config.steps, params)
    averaged = config.optimizer.average_decay > 0
    return optimizer, jax.eval_shape(partial(_initial_state, optimizer, averaged), params)


def _initial_state(optimizer: optax.GradientTransformation, averaged: bool, params: Params) -> State:
    zero = jnp.zeros((), jnp.int32)
    return State(params, optimizer.init(params), zero, zero - 1, params if averaged else {})


def make_step(
    model: TextTower, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> jax.stages.Wrapped:
    """The jitted function (state, batch) -> (state, metrics); it takes over the state's memory.

    batch: images bfloat16 [n, width], ids integer [n * captions, length], rows int32 [n], each dealt over
    the mesh; packed captions as `lit_fast.train.input_pipeline.packing` lays them. metrics: float32 scalars.
    """
    schedule, text = make_schedule(config.optimizer, config.steps), config.text
    masked = (config.loss.negatives, config.loss.same_image, config.loss.same_caption) != (
        LossConfig.negatives, LossConfig.same_image, LossConfig.same_caption
    )  # fmt: skip

    def loss_of(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Logits]:
        trained = Trained(
            _embed(model, params, batch, key if text.dropout else None, text),
            params["t"][0],
            params["b"][0] if "b" in params else None,
            params["img"]["head"]["kernel"] if "img" in params else None,
        )
        features = normalize(batch["images"].astype(jnp.float32) - params["mean"])
        # No place in the batch has this number, so dropout and the choice of negatives share no key.
        words = jax.random.bits(jax.random.fold_in(key, 2**32 - 1), (2,))
        captions = config.stream.captions_per_image
        ids = partial(_captions, batch, model.max_length)
        pairs = pair_up(config.loss, mesh.size, features, batch["rows"], captions, ids, words)
        return pair_loss(config.loss, mesh.size, trained, *pairs)

    def gradients(
        params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Params, tuple[jax.Array, ...], jax.Array]:
        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch, key)
        # One sum for everything that adds up; the extremes are four numbers and need a maximum.
        loss, grads, sums = jax.lax.psum((loss, grads, logits[:4]), AXIS)
        return loss, grads, sums, jax.lax.pmax(jnp.stack(logits[4:]), AXIS)

    gradients = shard_map(gradients, mesh, (REPLICATED, SHARDED, REPLICATED))

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        loss, grads, sums, bounds = gradients(state.params, batch, key)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        if config.loss.temperature_max:  # after the update, as open_clip does; the gradient knows no limit
            params["t"] = jnp.minimum(params["t"], math.log(config.loss.temperature_max))
        grad_norm = optax.global_norm(grads)
        param_norm = optax.global_norm({k: v for k, v in params.items() if k != "mean"})
        fine = jnp.isfinite(loss + grad_norm + param_norm) | (state.bad_step >= 0)
        bad_step = jnp.where(fine, state.bad_step, state.step)
        metrics = {
            "loss": loss,
            "temperature": jnp.exp(params["t"][0]),
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "update_norm": optax.global_norm(updates),
            "learning_rate": config.optimizer.learning_rate * schedule(state.step),
        } | logit_metrics(sums, bounds)
        if "b" in params:
            metrics["bias"] = params["b"][0]
        if masked:
            metrics["negatives"] = sums[1]
        decay = config.optimizer.average_decay
        # An empty average stays empty.
        average = {
            k: jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, a, params[k])
            for k, a in state.average.items()
        }
        return State(params, opt, state.step + 1, bad_step, average), metrics

    whole, part = replicated(mesh), batch_sharding(mesh)
    return jax.jit(step, in_shardings=(whole, part), out_shardings=(whole, whole), donate_argnums=0)


def _captions(batch: dict[str, jax.Array], length: int) -> jax.Array:
    """This device's captions in their order, integer [n * captions, length]."""
    if "lengths" not in batch:
        return batch["ids"]
    return unpacked(batch["ids"], batch["lengths"], batch["slots"], length)


def _embed(
    model: TextTower,
    params: Params,
    batch: dict[str, jax.Array],
    dropout: jax.Array | None,
    text: TextConfig,
) -> jax.Array:
    """Normalised embeddings of this device's captions in their order, worked out in `text.microbatches` equal parts.

    With `text.keep = "embeddings"` a part keeps nothing else, and the backward pass works it out again. The
    dropout of a row depends on the key and its place in the global batch, so neither the parts nor, where a row
    is one caption, the number of devices change it.
    """
    ids, lengths = batch["ids"], batch.get("lengths")
    place = jax.lax.axis_index(AXIS) * len(ids) + jnp.arange(len(ids))

    def embed(ids: jax.Array, lengths: jax.Array | None, place: jax.Array) -> jax.Array:
        if dropout is None:
            return embed_ids(model, params, ids, lengths)

        def one(ids: jax.Array, lengths: jax.Array | None, place: jax.Array) -> jax.Array:
            ids, lengths = jax.tree.map(lambda a: a[None], (ids, lengths))
            return embed_ids(model, params, ids, lengths, jax.random.fold_in(dropout, place))

        texts = jax.vmap(one)(ids, lengths, place)
        return texts.reshape(-1, texts.shape[-1])

    if text.keep == "embeddings":
        embed = jax.checkpoint(embed)
    rows = ids, lengths, place
    if text.microbatches > 1:
        parts = jax.tree.map(lambda a: a.reshape(text.microbatches, -1, *a.shape[1:]), rows)
        texts = jax.lax.map(lambda part: embed(*part), parts)
        texts = texts.reshape(-1, texts.shape[-1])
    else:
        texts = embed(*rows)
    return texts if lengths is None else texts[batch["slots"]]
