"""The compiled step: equal on every mesh, no array of batch x batch, no gathered embeddings."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lit_fast.config import Config, LossConfig, OptimizerConfig, StreamConfig, TextConfig
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import embed_ids, init_params
from lit_fast.runtime import batch_sharding, make_mesh, replicated
from lit_fast.train.optimizer import make_optimizer
from lit_fast.train.step import init_state, make_step, with_parameter_norms

WIDTH, LENGTH, VOCAB = 24, 8, 100
SHAPE = Shape(width=32, depth=2, mlp_dim=64, heads=2)
TOWER = TextTower(SHAPE, VOCAB, LENGTH, WIDTH)
# Without optimized machine code compiling takes half the time.
QUICK = {"xla_backend_optimization_level": 0}


@cache
def initial_params(loss):
    return init_params(TOWER, Config(loss=loss), np.zeros(WIDTH, np.float32))


@cache
def compiled(
    devices,
    *,
    batch=64,
    tile=16,
    captions=1,
    dropout=0.0,
    microbatches=1,
    keep="products",
    steps=20,
    loss=(),
    averaged=0.0,
    **text,
):
    """Return the compiled step, the state on the host and the mesh; `loss` is pairs of key and value."""
    config = Config(
        steps=steps,
        text=TextConfig(dropout=dropout, microbatches=microbatches, keep=keep),
        loss=LossConfig(tile=tile, precision="highest", **dict(loss)),
        stream=StreamConfig(global_batch=batch, captions_per_image=captions),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=1e-2, b2=0.95, warmup_steps=2, average_decay=averaged
        ),
    )
    mesh = make_mesh(jax.devices()[:devices])
    model = TOWER.clone(dropout=dropout, **text)
    params = initial_params(config.loss)
    optimizer = make_optimizer(config.optimizer, steps, params)
    state = init_state(params, optimizer, mesh, averaged > 0)
    step = make_step(model, optimizer, config, mesh).lower(state, batch_of(0, batch, captions, mesh))
    return step.compile(compiler_options=QUICK), jax.device_get(state), mesh


def build(devices, **options):
    """Return the compiled step, a state that it may donate, and the mesh."""
    step, state, mesh = compiled(devices, **options)
    return step, jax.device_put(state, replicated(mesh)), mesh


def batch_of(seed, n, captions, mesh):
    rng = np.random.default_rng(seed)
    batch = {
        "images": rng.normal(size=(n, WIDTH)).astype(ml_dtypes.bfloat16),
        "ids": rng.integers(0, VOCAB, (n * captions, LENGTH)).astype(np.uint16),
        "rows": rng.integers(0, 50, n).astype(np.int32),
    }
    return {k: jax.device_put(v, batch_sharding(mesh)) for k, v in batch.items()}


PLAIN = {"averaged": 0.75}


@pytest.mark.parametrize(
    ("some", "options"),
    [
        ((1, 4), PLAIN),
        ((1, 2), {"captions": 2, "dropout": 0.3, "pooling": "mean", "eos_id": 1, "microbatches": 4}),
    ],
)
def test_step_on_any_number_of_devices_agrees(some, options):
    losses = {}
    for devices in some:
        step, state, mesh = build(devices, **options)
        losses[devices] = []
        for i in range(4):
            state, metrics = step(state, batch_of(i, 64, options.get("captions", 1), mesh))
            losses[devices].append(float(metrics["loss"]))
    for devices in some[1:]:
        # The sums are the same numbers in another order, and Adam divides them by their own size; four
        # steps of 1e-2 keep the difference near float32 rounding of the loss (about 10).
        np.testing.assert_allclose(losses[devices], losses[1], rtol=2e-5)
    assert len(set(losses[1])) == len(losses[1])


@pytest.mark.parametrize(
    ("keep", "microbatches"),
    [("hidden", 8), ("inputs", 1), ("embeddings", 8)],
)
def test_step_with_remat_and_microbatches_equals_the_plain_one(keep, microbatches):
    """With dropout too; only the order of the float32 sums differs."""
    results = []
    for how in ({}, {"keep": keep, "microbatches": microbatches}):
        step, state, mesh = build(2, dropout=0.3, **how)
        state, metrics = step(state, batch_of(0, 64, 1, mesh))
        results.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    # Sums in another order, in float32.
    np.testing.assert_allclose(results[0], results[1], rtol=2e-5)


def test_logged_step_has_the_norms_of_parameters_and_updates():
    step, state, mesh = build(2)
    logged = with_parameter_norms(step, mesh)
    state, unlogged = logged(state, batch_of(0, 64, 1, mesh), False)
    for number in (1, 2):
        before = jax.device_get(state.params)
        state, metrics = logged(state, batch_of(number, 64, 1, mesh), True)
        after = jax.device_get({k: v for k, v in state.params.items() if k != "mean"})
        changes = jax.tree.map(np.subtract, after, {k: before[k] for k in after})
        for name, tree in (("param_norm", after), ("update_norm", changes)):
            leaves = [leaf.astype(np.float64).ravel() for leaf in jax.tree.leaves(tree)]
            np.testing.assert_allclose(
                float(metrics[name]), np.linalg.norm(np.concatenate(leaves)), rtol=1e-5
            )
    assert float(metrics["update_norm"]) > 0
    assert set(metrics) - set(unlogged) == {"param_norm", "update_norm"}


def largest_buffer(text):
    """Return the number of elements of the largest array in a compiled program."""
    shapes = re.findall(r"(?:f32|bf16|s32|u32|pred|u16)\[([\d,]+)\]", text)
    return max(int(np.prod([int(d) for d in s.split(",")])) for s in shapes)


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (4, 4)])
def test_compiled_step_has_no_batch_by_batch_buffer_and_no_all_gather(devices, microbatches):
    batch = 4096
    text = build(devices, batch=batch, tile=64, microbatches=microbatches)[0].as_text()
    # The largest array is an activation, [texts of a device, length, mlp_dim], stacked for two layers.
    assert largest_buffer(text) <= 2 * (batch // devices) * LENGTH * SHAPE.mlp_dim < batch**2
    assert "all-gather" not in text
    # Several devices sum loss and gradients once a step, not once per layer or microbatch. The only other reduction is
    # that of the smallest and largest logits.
    reduced = re.findall(r"= (\(?\w+\[[\d,]*\]).* all-reduce\(", text)
    assert len(reduced) == text.count(" all-reduce(") == (2 if devices > 1 else 0)
    assert "f32[4]" in reduced or devices == 1
    # Image features and their row numbers rotate, and nothing else.
    tiles = batch // devices // 64
    sent = set(re.findall(r"= (\w+\[[\d,]*\])\S* collective-permute\(", text))
    assert sent == ({f"f32[{tiles},64,{WIDTH}]", f"s32[{tiles},64]"} if devices > 1 else set())
    if devices == 1:  # the check finds the matrix if there is one
        assert largest_buffer(build(1, batch=batch, tile=batch)[0].as_text()) >= batch**2


def test_compiled_step_needs_memory_linear_in_the_batch():
    steps = (build(4, batch=b, tile=64, microbatches=4)[0] for b in (1024, 4096))
    small, large = (step.memory_analysis().temp_size_in_bytes for step in steps)
    # Up to differences in the reuse of buffers. A matrix of pairs (64 MiB at the end) would take sixteen times the
    # memory for four times the batch.
    assert large <= 5 * small


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "softmax", "image_head": True, "same_caption": "mask"},
        {"negatives": "random", "negatives_per_positive": 4.0, "temperature_max": 20.0},
    ],
    ids=["softmax", "random negatives"],
)
def test_step_with_other_losses_agrees_on_one_and_four_devices(loss):
    results = {}
    for devices in (1, 4):
        step, state, mesh = build(devices, captions=2, loss=tuple(loss.items()))
        state = state._replace(params=state.params | {"t": jnp.log(jnp.full((1,), 30.0))})
        for i in range(3):
            state, metrics = step(state, batch_of(i, 64, 2, mesh))
            if i == 0:  # the learning rate starts at 0
                limit = loss.get("temperature_max", 30.0)
                assert float(metrics["temperature"]) == pytest.approx(limit, rel=1e-6)
        results[devices] = {k: float(v) for k, v in metrics.items()}
        assert ("b" in state.params) == ("bias" in metrics) == ("name" not in loss)
        if "temperature_max" in loss:
            assert float(metrics["temperature"]) <= 20 * (1 + 1e-6)
            # 63 images x 128 texts, probability 4/63: standard deviation 22.
            assert results[devices]["negatives"] == pytest.approx(4 * 128, abs=110)
        if loss.get("image_head"):
            moved = np.abs(np.asarray(state.params["img"]["head"]["kernel"]) - np.eye(WIDTH)).max()
            assert 1e-3 < moved < 0.1  # two updates of Adam, of at most 1e-2 each
    # As above; the logits are of the size of ten.
    assert results[1] == pytest.approx(results[4], rel=2e-4, abs=2e-5)


def test_logit_metrics_equal_the_matrix_of_all_pairs():
    """Check the first step."""
    step, state, mesh = build(2, captions=2)
    params = jax.device_get(state.params)
    batch = batch_of(0, 64, 2, mesh)
    texts = np.asarray(embed_ids(TOWER, params, np.asarray(batch["ids"])))
    images = np.float64(np.asarray(batch["images"], np.float32))
    logit = 10 * images @ texts.T / np.linalg.norm(images, axis=1, keepdims=True) - 10
    rows = np.asarray(batch["rows"])
    positive = rows[:, None] == np.repeat(rows, 2)[None, :]
    _, metrics = step(state, batch)
    for kind, mask in (("positive", positive), ("negative", ~positive)):
        for figure in ("mean", "min", "max"):
            # float32 logits of about ten.
            want = getattr(logit[mask], figure)()
            assert float(metrics[f"{kind}_logit_{figure}"]) == pytest.approx(want, abs=5e-5)
    assert "negatives" not in metrics  # no pairs are masked


def test_step_that_is_not_finite_is_recorded_in_the_state():
    step, state, mesh = build(4, **PLAIN)
    for i in range(5):
        batch = batch_of(i, 64, 1, mesh)
        if i == 2:
            batch["images"] = batch["images"] * np.nan
        state, _ = step(state, batch)
    assert int(state.bad_step) == 2


def test_average_equals_its_definition():
    """Check three steps."""
    decay = PLAIN["averaged"]
    step, state, mesh = build(1, **PLAIN)
    want = jax.tree.map(np.asarray, state.params)
    for seed in range(3):
        state, _ = step(state, batch_of(seed, 64, 1, mesh))
        want = jax.tree.map(lambda a, p: decay * a + (1 - decay) * np.asarray(p), want, state.params)
    # float32: three roundings of values up to 10.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), state.average, want)
    assert not np.allclose(state.average["txt"]["head"]["kernel"], state.params["txt"]["head"]["kernel"])
