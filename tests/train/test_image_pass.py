"""A trained image tower in the step: its gradients against float64, on any number of devices and microbatches."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lit_fast.config import Config, ImageConfig, LossConfig, OptimizerConfig, StreamConfig, TextConfig
from lit_fast.models import encoder_pass
from lit_fast.models.architecture import Architecture
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import init_params
from lit_fast.runtime import batch_sharding, make_mesh, replicated
from lit_fast.train.step import init_state, make_step
from tests.losses.dense_loss import dense_loss
from tests.reference import encoder, text_tower

SIZE, LENGTH, VOCAB, BATCH = 16, 6, 50, 8
SHAPE = Shape(width=32, depth=2, mlp_dim=64, heads=2)
IMAGE = ImageTower(Architecture(SHAPE, 8, "tok", "tanh"), SIZE, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
TEXT = TextTower(SHAPE, VOCAB, LENGTH, SHAPE.width)
# Without optimized machine code compiling takes half the time.
QUICK = {"xla_backend_optimization_level": 0}


@cache
def initial_params(image_head=False):
    """Return parameters of which none is zero or the identity."""
    config = Config(loss=LossConfig(image_head=image_head))
    params = init_params(TEXT, config, np.zeros(SHAPE.width, np.float32), IMAGE)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: np.asarray(a + 0.1 * rng.normal(size=a.shape), np.float32), params)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8),
        "ids": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.uint16),
        "rows": rng.integers(0, 6, BATCH).astype(np.int32),
    }


def lowered(devices, keep="products", microbatches=1, **loss):
    config = Config(
        text=TextConfig(keep="products"),
        image=ImageConfig(train="unlocked", keep=keep, microbatches=microbatches),
        loss=LossConfig(tile=3, precision="highest", **loss),
        stream=StreamConfig(global_batch=BATCH),
        optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1.0),
    )
    mesh = make_mesh(jax.devices()[:devices])
    optimizer = optax.sgd(1.0)  # the update is the negative gradient
    state = init_state(initial_params(config.loss.image_head), optimizer, mesh)
    batch = {k: jax.device_put(v, batch_sharding(mesh)) for k, v in batch_of().items()}
    return make_step(TEXT, optimizer, config, mesh, IMAGE).lower(state, batch), state, batch, mesh


def loss_and_update(devices, **options):
    """Return the loss and, by difference of the parameters, the gradient."""
    step, state, batch, mesh = lowered(devices, **options)
    before = jax.device_get(state.params)
    state, metrics = step.compile(compiler_options=QUICK)(jax.device_put(state, replicated(mesh)), batch)
    after = jax.device_get(state.params)
    return float(metrics["loss"]), jax.tree.map(lambda a, b: np.float64(a) - b, before, after)


def vit(pixels, p):
    """Compute the features of `IMAGE` in float64."""
    x = (np.float64(pixels) / 255 - IMAGE.mean) / IMAGE.std
    n, patch, side = len(x), 8, SIZE // 8
    x = x.reshape(n, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, side * side, -1)
    x = x @ p["embedding"]["kernel"].reshape(-1, SHAPE.width) + p["embedding"]["bias"] + p["pos_embedding"]
    x = np.concatenate([np.broadcast_to(p["cls"], (n, 1, SHAPE.width)), x], axis=1)
    return encoder(x, p["Transformer"], "tanh")[:, 0]


def dense(config, params):
    """Return the loss of the batch in float64, from the matrix of all pairs."""
    batch = batch_of()

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    images = unit(vit(batch["pixels"], params["img"]) - params["mean"])
    if config.image_head:
        images = unit(images @ params["img"]["head"]["kernel"])
    texts = unit(text_tower(batch["ids"], params["txt"], "last"))
    bias = params["b"][0] if "b" in params and config.name == "sigmoid" else None
    sides = {"features": images, "rows": batch["rows"], "ids": batch["ids"]}
    return dense_loss(config, sides, texts, params["t"][0], bias)[0]


@pytest.mark.parametrize(
    ("devices", "loss", "options"),
    [
        (1, {}, {}),
        (2, {"image_head": True}, {"keep": "hidden"}),
        (4, {"name": "softmax"}, {}),
        (2, {"same_caption": "mask"}, {"keep": "embeddings", "microbatches": 4}),
        (1, {"name": "softmax", "image_head": True}, {"keep": "inputs", "microbatches": 2}),
    ],
)
@pytest.mark.parametrize("fold", [False, True])
def test_step_with_image_tower_equals_dense_float64(devices, loss, options, fold, monkeypatch):
    """The loss, and its derivative along random directions of each tower's parameters."""
    monkeypatch.setattr(encoder_pass, "_CPU_TOKENS_PER_WIDTH", 0 if fold else 1000)
    config = LossConfig(**loss)
    value, gradient = loss_and_update(devices, **options, **loss)
    params = jax.tree.map(np.float64, initial_params(config.image_head))
    np.testing.assert_allclose(value, dense(config, params), rtol=1e-5)
    rng = np.random.default_rng(1)
    for tower in ("img", "txt"):
        direction = jax.tree.map(lambda a: rng.normal(size=a.shape) * np.abs(a).mean(), params[tower])
        ahead, behind = (
            dense(config, params | {tower: jax.tree.map(lambda a, d: a + s * d, params[tower], direction)})  # noqa: B023
            for s in (1e-5, -1e-5)
        )
        dots = jax.tree.map(lambda g, d: np.sum(g * d), gradient[tower], direction)
        scale = sum(np.sum(np.abs(d)) for d in jax.tree.leaves(dots))
        # float32 gradients, and their difference from parameters of about 0.3: 1e-7 of each term.
        np.testing.assert_allclose(
            sum(jax.tree.leaves(dots)), (ahead - behind) / 2e-5, rtol=2e-4, atol=1e-5 * scale
        )
    assert not gradient["mean"].any()


def test_compiled_step_with_image_tower_has_no_all_gather_and_returns_gradients_by_the_ring():
    text = lowered(4)[0].compile(compiler_options=QUICK).as_text()
    assert "all-gather" not in text
    sent = set(re.findall(r"= (\w+\[[\d,]*\])\S* collective-permute\(", text))
    assert sent == {f"f32[1,2,{SHAPE.width}]", "s32[1,2]"}  # embeddings and their gradients, and row numbers
    assert len(re.findall(r" all-reduce\(", text)) == 2


@pytest.mark.parametrize("pool", ["tok", "gap", "map"])
def test_image_tower_initial_parameters_are_those_of_big_vision(pool):
    """Class token zero, positions 1/sqrt(width), biases of the MLP 1e-6, attention and MLP Xavier-uniform."""
    shape = Shape(width=256, depth=2, mlp_dim=512, heads=4)
    architecture = Architecture(shape, 8, pool, "tanh", class_token=pool == "tok")
    tower = ImageTower(architecture, 64, (0.5,) * 3, (0.5,) * 3)
    params = jax.device_get(tower.init(jax.random.key(0)))
    assert tower.features(params, jnp.zeros((2, 64, 64, 3), jnp.uint8)).shape == (2, 256)
    assert ("cls" in params, "MAPHead_0" in params) == (pool == "tok", pool == "map")
    assert not params.get("cls", np.zeros(1)).any()
    block = params["Transformer"]["encoderblock"]
    # Xavier-uniform: variance 2 / (inputs + outputs), Lecun-normal: 1 / inputs. Samples of at least 16 384 values
    # have a standard deviation within 2 % of it.
    for array, deviation in (
        (params["pos_embedding"], 256**-0.5),
        (params["embedding"]["kernel"], (8 * 8 * 3) ** -0.5),
        (block["MultiHeadDotProductAttention_0"]["query"]["kernel"], (2 / 512) ** 0.5),
        (block["MultiHeadDotProductAttention_0"]["out"]["kernel"], (2 / 512) ** 0.5),
        (block["MlpBlock_0"]["Dense_0"]["kernel"], (2 / 768) ** 0.5),
    ):
        assert array.std() == pytest.approx(deviation, rel=0.03)
    assert 0 < np.abs(block["MlpBlock_0"]["Dense_0"]["bias"]).max() < 1e-5
    assert np.array_equal(block["LayerNorm_0"]["scale"], np.ones((2, 256)))
