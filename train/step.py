"""One training step, compiled for a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from lit_fast.config import Config
from lit_fast.losses.accumulate import LogitMaxima, LogitStats, LossParams, logit_metrics
from lit_fast.losses.contrastive import contrastive_loss
from lit_fast.losses.pairs import make_sides
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.text_tower import TextTower, unpack_captions
from lit_fast.models.two_towers import Params, image_head, init_params
from lit_fast.runtime import AXIS, REPLICATED, SHARDED, batch_sharding, platform_of, replicated, shard_map
from lit_fast.train.image_pass import embed_pixels
from lit_fast.train.optimizer import make_optimizer, make_schedule
from lit_fast.train.sizes import with_tile
from lit_fast.train.text_pass import DeviceBatch, embed_texts
from lit_fast.utils.normalize import normalize

Metrics = dict[str, jax.Array]

# Key index of the choice of negatives; no row of a batch has this number, so dropout never uses the same key.
_SEEDS_INDEX = 2**32 - 1


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    opt: Any
    step: jax.Array  # int32 [], completed updates
    bad_step: jax.Array  # int32 [], the first step whose loss or gradient was not finite; -1: none
    average: Params  # exponential moving average of the parameters; empty if none is configured


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, averaged: bool = False
) -> State:
    """Make the state before the first step, replicated over the mesh."""
    make = partial(_initial_state, optimizer, averaged)
    return jax.jit(make, out_shardings=replicated(mesh))(params)


def abstract_training(
    model: TextTower, config: Config, image: ImageTower | None = None
) -> tuple[optax.GradientTransformation, State]:
    """Build the optimizer, and the training state as shapes and dtypes, without computing anything.

    Raises:
      UserError: a rule of the optimizer matches no parameter.
    """
    params = jax.eval_shape(lambda: init_params(model, config, np.zeros(model.out_dim), image))
    optimizer = make_optimizer(config.optimizer, config.steps, params)
    averaged = config.optimizer.average_decay > 0
    return optimizer, jax.eval_shape(partial(_initial_state, optimizer, averaged), params)


def _initial_state(optimizer: optax.GradientTransformation, averaged: bool, params: Params) -> State:
    zero = jnp.zeros((), jnp.int32)
    return State(params, optimizer.init(params), zero, zero - 1, params if averaged else {})


def make_step(
    model: TextTower,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    image: ImageTower | None = None,
) -> jax.stages.Wrapped:
    """Return the jitted function (state, batch) -> (state, metrics); it donates the state.

    Args:
      model: the text tower.
      optimizer: as `init_state` had it.
      config: of the run.
      mesh: the devices; the batch is sharded over them, the state replicated.
      image: the image tower, if it is trained; its remat policy is that of the configuration.

    The batch has images bfloat16 [n, width], or with a trained image tower pixels uint8 [n, size, size, 3]; ids integer
    [n * captions, length] and rows int32 [n]; for packed captions see `lit_fast.train.input_pipeline.packing`. Metrics
    are float32 scalars; those of `_parameter_norms` are there on accelerators only, see `with_parameter_norms`.
    """
    schedule = make_schedule(config.optimizer, config.steps)
    sharded_loss_and_grads = shard_map(
        lambda params, batch, key: loss_and_grads(
            model, config, mesh.size, platform_of(mesh), params, batch, key, image
        )[:3],
        mesh,
        (REPLICATED, SHARDED, REPLICATED),
    )

    def step(state: State, batch: DeviceBatch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        loss, grads, stats = sharded_loss_and_grads(state.params, batch, key)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        if config.loss.temperature_max:  # after the update, as open_clip does; the gradient ignores the limit
            params["t"] = jnp.minimum(params["t"], math.log(config.loss.temperature_max))

        metrics = {
            "loss": loss,
            "temperature": jnp.exp(params["t"][0]),
            "grad_norm": optax.global_norm(grads),
            "learning_rate": config.optimizer.learning_rate * schedule(state.step),
        } | logit_metrics(stats)
        if "b" in params:
            metrics["bias"] = params["b"][0]
        rules = config.loss.negatives, config.loss.same_caption, config.loss.near_duplicates
        if rules != ("all", "negative", "negative"):
            metrics["negatives"] = stats.sums.num_negatives

        finite = jnp.isfinite(loss + metrics["grad_norm"])
        if platform_of(mesh) != "cpu":
            metrics |= _parameter_norms(params, updates)
            finite &= jnp.isfinite(metrics["param_norm"])
        bad_step = jnp.where(finite | (state.bad_step >= 0), state.bad_step, state.step)
        decay = config.optimizer.average_decay
        average = {  # an empty average stays empty
            k: jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, a, params[k])
            for k, a in state.average.items()
        }
        return State(params, opt, state.step + 1, bad_step, average), metrics

    shardings = replicated(mesh), batch_sharding(mesh)
    return jax.jit(step, in_shardings=shardings, out_shardings=shardings[0], donate_argnums=0)


def _parameter_norms(params: Params, updates: Params) -> Metrics:
    return {
        "param_norm": optax.global_norm({k: v for k, v in params.items() if k != "mean"}),
        "update_norm": optax.global_norm(updates),
    }


@jax.jit
def _norms_of_change(previous: Params, params: Params) -> Metrics:
    return _parameter_norms(params, jax.tree.map(jnp.subtract, params, previous))


def with_parameter_norms(
    step: Any, mesh: Mesh
) -> Callable[[State, DeviceBatch, bool], tuple[State, Metrics]]:
    """Return the function (state, batch, logged) -> (state, metrics), which has all metrics where `logged`.

    On CPUs the norms of the parameters and their updates take as long as the rest of Adam: XLA writes the updates to
    memory for them. Logged steps compute them apart, from the parameters before and after the step; the difference
    has the rounding of float32 and the limit of `loss.temperature_max` in it.

    Args:
      step: what `make_step` returns.
      mesh: its devices.
    """
    if platform_of(mesh) != "cpu":
        return lambda state, batch, logged: step(state, batch)

    def run(state: State, batch: DeviceBatch, logged: bool) -> tuple[State, Metrics]:
        previous = jax.tree.map(jnp.copy, state.params) if logged else None
        state, metrics = step(state, batch)
        return state, metrics | _norms_of_change(previous, state.params) if logged else metrics

    return run


def loss_and_grads(
    model: TextTower,
    config: Config,
    num_devices: int,
    platform: str,
    params: Params,
    batch: DeviceBatch,
    key: jax.Array,
    image: ImageTower | None = None,
) -> tuple[jax.Array, Params, LogitStats, jax.Array]:
    """Compute loss, gradients and logit statistics of the global batch; runs on each device.

    The last result is the embeddings of this device's texts, normalized, float32 [n, width].
    """
    loss_share = partial(_loss_share, model, image, with_tile(config, platform), num_devices, platform)
    (loss, (stats, texts)), grads = jax.value_and_grad(loss_share, has_aux=True)(params, batch, key)
    if num_devices == 1:  # XLA would copy the gradients
        return loss, grads, stats, texts
    # One all-reduce for everything that adds up; the maxima need their own.
    loss, grads, sums = lax.psum((loss, grads, stats.sums), AXIS)
    maxima = LogitMaxima(*lax.pmax(jnp.stack(stats.maxima), AXIS))
    return loss, grads, LogitStats(sums, maxima), texts


def _loss_share(
    model: TextTower,
    image: ImageTower | None,
    config: Config,
    num_devices: int,
    platform: str,
    params: Params,
    batch: DeviceBatch,
    key: jax.Array,
) -> tuple[jax.Array, tuple[LogitStats, jax.Array]]:
    """Compute the loss of this device's texts against the images of all devices; with logit statistics and texts."""
    if image is None:
        images = normalize(batch["images"].astype(jnp.float32) - params["mean"])
    else:
        images = embed_pixels(image, config, params, batch["pixels"], platform)
    seeds = jax.random.bits(jax.random.fold_in(key, _SEEDS_INDEX), (2,))
    loss_params = LossParams(
        texts=embed_texts(model, config.text, params, batch, key, platform),
        log_scale=params["t"][0],
        bias=params["b"][0] if "b" in params else None,
        head=image_head(params) if image is None else None,
        images=None if image is None else images,
    )
    ids = partial(_caption_ids, batch, model.max_length)
    captions = config.stream.captions_per_image
    sides = make_sides(config.loss, num_devices, images, batch["rows"], captions, ids, seeds)
    loss, stats = contrastive_loss(config.loss, num_devices, loss_params, *sides)
    return loss, (stats, loss_params.texts)


def _caption_ids(batch: DeviceBatch, length: int) -> jax.Array:
    """Return the token ids of this device's captions in their order, integer [n * captions, length]."""
    if "lengths" not in batch:
        return batch["ids"]
    return unpack_captions(batch["ids"], batch["lengths"], batch["slots"], length)
