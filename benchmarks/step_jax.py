"""The steps in JAX: ours as `lit_fast.train.step_builder` builds it, and a reimplementation of big_vision's.

big_vision: trainers/proj/image_text/siglip.py, models/proj/image_text/text_transformer.py, models/vit.py. Its image
tower is left out, its optimizer is optax's AdamW with clipping, and its sharding constraints, which do nothing on one
device, are gone. Its text tower is float32 throughout; "bfloat16" is its `dtype_mm`, which only its ViT is given.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import step_case
from benchmarks.step_case import FEATURES, VOCAB, Case, Rival, Weights, make_batch, make_weights
from lit_fast.config import Config, LossConfig, OptimizerConfig, StreamConfig, TextConfig
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import text_tower
from lit_fast.runtime import batch_sharding, make_mesh
from lit_fast.train.cost.aot import compile_step
from lit_fast.train.cost.memory import choose_remat
from lit_fast.train.input_pipeline.packing import Packing, true_lengths, with_rows
from lit_fast.train.optimizer import make_optimizer
from lit_fast.train.step import abstract_training, init_state, make_step
from lit_fast.utils.normalize import normalize

ROOM = 32 * 2**30  # bytes of device memory when nothing is run


def _config(case: Case, ids: np.ndarray) -> Config:
    """Return the configuration of a run on these captions; packed rows are as many as they require."""
    b1, b2 = step_case.BETAS
    text = TextConfig(
        width=case.width, depth=case.depth, heads=case.heads, dtype=case.dtype, mask_padding=case.masked, pack=case.pack
    )  # fmt: skip
    if text.packed:
        texts = case.batch // case.devices
        text = with_rows(text, true_lengths(ids, step_case.END), texts, case.length, case.devices)
    return Config(
        steps=10**9,  # a constant learning rate
        text=text,
        loss=LossConfig(temperature_init=step_case.TEMPERATURE, bias_init=step_case.BIAS),
        stream=StreamConfig(global_batch=case.batch),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=step_case.LEARNING_RATE, b1=b1, b2=b2, warmup_steps=0,
            weight_decay=step_case.DECAY, weight_decay_convention="optax", clip_norm=step_case.CLIP,
        ),
    )  # fmt: skip


def _tower(case: Case, text: TextConfig) -> TextTower:
    """Return the tower that training builds; it reads three numbers of a tokenizer."""
    tokenizer: Any = SimpleNamespace(vocab_size=VOCAB, max_length=case.length, eos_id=step_case.END)
    return text_tower(text, tokenizer, FEATURES)


def _fitted(case: Case, ids: np.ndarray, memory: int | None = None) -> tuple[Config, str]:
    """Return the configuration with the choice of `text.keep = "auto"` for that memory, and a description."""
    config = _config(case, ids)
    training = abstract_training(_tower(case, config.text), config)
    text = choose_remat(config, partial(_tower, case), make_mesh(), *training, memory).text
    return replace(config, text=text), f"text.keep {text.keep}, {text.microbatches:,} microbatches"


def _peak_memory() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _scalars() -> Weights:
    t, b = np.log(step_case.TEMPERATURE), step_case.BIAS
    return {"t": jnp.full((1,), t, jnp.float32), "b": jnp.full((1,), b, jnp.float32)}


def ours(case: Case) -> Rival:
    """Build the step of a training run. Packing is done once in advance; in a run the loader does it."""
    mesh = make_mesh()
    features, ids = make_batch(case)
    config, note = _fitted(case, ids)
    text, model = config.text, _tower(case, config.text)
    arrays = {
        "images": features.astype(jnp.bfloat16),
        "ids": ids.astype(np.uint16),
        "rows": np.arange(case.batch, dtype=np.int32),
    }
    if text.packed:
        mean = float(true_lengths(ids, step_case.END).mean())
        texts = case.batch // mesh.size
        arrays = Packing(text, texts, step_case.END, mean, mesh.size, mesh.size)(arrays)
        note += f", {text.rows:,} rows of {text.row_tokens} tokens"
    batch = {k: jax.make_array_from_process_local_data(batch_sharding(mesh), v) for k, v in arrays.items()}
    params = jax.tree.map(jnp.asarray, {"txt": make_weights(case), "mean": np.zeros(FEATURES, np.float32)})
    params |= _scalars()
    optimizer = make_optimizer(config.optimizer, config.steps, params)
    state = init_state(params, optimizer, mesh)
    parameters = _count(params)
    del params
    return _rival(make_step(model, optimizer, config, mesh), state, (batch,), parameters, note)


def _rival(jitted: Any, state: Any, arguments: tuple, parameters: int, note: str = "") -> Rival:
    """Compile a function (state, *arguments) -> (state, metrics)."""
    compiled = jitted.lower(state, *arguments).compile()

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, *arguments)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    # JAX reports no memory of CPUs.
    return Rival(step, parameters, _peak_memory if _peak_memory() else None, note)  # type: ignore[arg-type]


def _count(params: Weights) -> int:
    return sum(p.size for p in jax.tree.leaves(params["txt"]))


class Block(nn.Module):
    """big_vision's Encoder1DBlock with its MlpBlock; the second result is the output that scan expects."""

    heads: int
    hidden: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        xavier = nn.initializers.xavier_uniform()
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=self.heads, kernel_init=xavier, dtype=self.dtype)(y, y)
        x = x + y
        y = nn.LayerNorm()(x)
        return x + Mlp(self.hidden, self.dtype, name="MlpBlock_0")(y), None


class Mlp(nn.Module):
    hidden: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        y = nn.gelu(dense(self.hidden)(x))
        return dense(x.shape[-1])(y)


class Encoder(nn.Module):
    depth: int
    heads: int
    hidden: int
    dtype: str
    scan: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = (self.heads, self.hidden, self.dtype)
        if self.scan:  # its default policy is "nothing_saveable"
            policy = jax.checkpoint_policies.nothing_saveable
            block = nn.scan(
                nn.remat(Block, prevent_cse=False, policy=policy),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = block(*sizes, name="encoderblock")(x, None)
        else:
            for layer in range(self.depth):
                x, _ = Block(*sizes, name=f"encoderblock_{layer}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class Tower(nn.Module):
    """big_vision's text transformer; the last position is pooled."""

    case: Case

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        case = self.case
        x = nn.Embed(VOCAB, case.width)(ids)
        normal = nn.initializers.normal(stddev=case.width**-0.5)
        x = x + self.param("pos_embedding", normal, (1, case.length, case.width))
        scan = case.form == "scan"
        x = Encoder(case.depth, case.heads, 4 * case.width, case.dtype, scan, name="Encoder_0")(x)
        return nn.Dense(FEATURES, name="head")(x[:, -1])


def _big_vision_step(case: Case) -> tuple[optax.GradientTransformation, Any]:
    model = Tower(case)
    b1, b2 = step_case.BETAS
    optimizer = optax.chain(
        optax.clip_by_global_norm(step_case.CLIP),
        optax.adamw(
            step_case.LEARNING_RATE,
            b1,
            b2,
            step_case.EPSILON,
            weight_decay=step_case.DECAY,
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: "kernel" in str(path[-1]), params
            ),
        ),
    )

    def loss_of(params: Weights, images: jax.Array, ids: jax.Array) -> jax.Array:
        texts = jnp.asarray(model.apply({"params": params["txt"]}, ids))
        texts = texts / (1e-8 + jnp.linalg.norm(texts, axis=1, keepdims=True))
        images = normalize(images.astype(jnp.float32))
        logits = jnp.dot(images, texts.T) * jnp.exp(params["t"]) + params["b"]
        label = -jnp.ones_like(logits) + 2 * jnp.eye(len(logits))
        return jnp.mean(-jnp.sum(jax.nn.log_sigmoid(label * logits), axis=-1))

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple, images: jax.Array, ids: jax.Array) -> tuple[tuple, dict[str, jax.Array]]:
        params, opt = state
        loss, grads = jax.value_and_grad(loss_of)(params, images, ids)
        updates, opt = optimizer.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        norms = {
            f"l2_{k}": optax.global_norm(v)
            for k, v in (("grads", grads), ("params", params), ("updates", updates))
        }
        return (params, opt), norms | {"loss": loss}

    return optimizer, step


def _big_vision_params(case: Case) -> Weights:
    weights = make_weights(case)
    if case.form != "scan":
        stacked = weights["Encoder_0"].pop("encoderblock")
        for layer in range(case.depth):
            weights["Encoder_0"][f"encoderblock_{layer}"] = jax.tree.map(lambda a, i=layer: a[i], stacked)
    return {"txt": jax.tree.map(jnp.asarray, weights), **_scalars()}


def big_vision(case: Case) -> Rival:
    """Build its step: layers store everything, or nothing with scan; one batch x batch matrix of logits."""
    optimizer, jitted = _big_vision_step(case)
    features, ids = (jnp.asarray(a) for a in make_batch(case))
    features = features.astype(jnp.bfloat16)
    params = _big_vision_params(case)
    state = jax.jit(lambda p: (p, optimizer.init(p)))(params)
    parameters = _count(params)
    del params
    return _rival(jitted, state, (features, ids), parameters)


def memory_by_compiler(case: Case) -> dict[str, Any]:
    """Return the bytes of arguments and temporaries of a step; nothing is run."""
    if case.rival == "ours":
        config, note = _fitted(case, make_batch(case)[1], ROOM)
        tower = _tower(case, config.text)
        made = compile_step(tower, config, make_mesh(), *abstract_training(tower, config))
        return {"memory": made.bytes, "note": note}
    optimizer, jitted = _big_vision_step(case)
    params = jax.eval_shape(lambda: _big_vision_params(case))
    state = jax.eval_shape(lambda p: (p, optimizer.init(p)), params)
    images = jax.ShapeDtypeStruct((case.batch, FEATURES), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    analysis: Any = jitted.lower(state, images, ids).compile().memory_analysis()
    return {"memory": analysis.argument_size_in_bytes + analysis.temp_size_in_bytes, "note": ""}
