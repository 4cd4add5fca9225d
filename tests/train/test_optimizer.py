"""Optimizers and schedules against short float64 references and optax."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lit_fast.config import Config, LossConfig, OptimizerConfig, TextConfig
from lit_fast.errors import UserError
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import init_params
from lit_fast.train.optimizer import (
    _clip,
    evaluation_params,
    make_optimizer,
    make_schedule,
    matrix_axes,
    parameter_names,
)

STEPS, WARMUP = 50, 5


def factor(step):
    progress = min(max((step - WARMUP) / (STEPS - WARMUP), 0), 1)
    return 0.5 * (1 + np.cos(np.pi * progress)) * min(1, step / WARMUP)


def test_cosine_schedule_equals_big_visions():
    # T = 65000, W = 6500; values of big_vision's schedule. float32 cosine: absolute error about 1e-7.
    want = {0: 0.0, 1: 1.538e-4, 6499: 0.99985, 6500: 1.0, 35750: 0.5, 64999: 7e-10}
    schedule = make_schedule(OptimizerConfig(warmup_steps=6500), 65000)
    for step, value in want.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-4, abs=2e-7)
    assert float(make_schedule(OptimizerConfig(warmup_steps=0), 10)(0)) == 1.0


def test_constant_schedule_warms_up_and_cools_down():
    config = OptimizerConfig(schedule="constant", warmup_steps=10, cooldown_steps=50)
    constant = make_schedule(config, 1000)
    np.testing.assert_allclose([constant(s) for s in (0, 5, 10, 900, 975)], [0, 0.5, 1, 1, 0.5], rtol=1e-6)


def test_linear_and_rsqrt_schedules_equal_big_visions():
    linear = make_schedule(OptimizerConfig(schedule="linear", warmup_steps=10), 110)
    np.testing.assert_allclose([linear(s) for s in (0, 5, 10, 60, 110)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    config = OptimizerConfig(schedule="rsqrt", warmup_steps=10, timescale=100, cooldown_steps=50)
    rsqrt = make_schedule(config, 1000)
    # big_vision: 1 / sqrt(1 + (step - warmup) / timescale), times the warm-up, times (T - step) / cooldown.
    want = [0, 0.5, 1, 1 / np.sqrt(1 + 300 / 100), 0.5 / np.sqrt(1 + 965 / 100)]
    np.testing.assert_allclose([rsqrt(s) for s in (0, 5, 10, 310, 975)], want, rtol=1e-6)


def lion(param, grads, config, decay):
    """Chen et al. 2023, with big_vision's weight decay, in float64."""
    param, momentum = param.astype(np.float64), np.zeros(param.shape)
    for step, grad in enumerate(grads.astype(np.float64)):
        sign = np.sign(config.b1 * momentum + (1 - config.b1) * grad)
        momentum = config.b2 * momentum + (1 - config.b2) * grad
        param = param - factor(step) * (config.learning_rate * sign + decay * param)
    return param


def adam(param, grads, config, decay):
    param, m, v = param.astype(np.float64), np.zeros(param.shape), np.zeros(param.shape)
    for step, grad in enumerate(grads.astype(np.float64)):
        m = config.b1 * m + (1 - config.b1) * grad
        v = config.b2 * v + (1 - config.b2) * grad**2
        update = m / (1 - config.b1 ** (step + 1)) / (np.sqrt(v / (1 - config.b2 ** (step + 1))) + 1e-8)
        param = param - factor(step) * (config.learning_rate * update + decay * param)
    return param


def adafactor(param, grads, config, decay):
    """Zhai et al. 2021 on a matrix: factored when both sides are at least 32; momentum not debiased."""
    param, m = param.astype(np.float64), np.zeros(param.shape)
    rows, columns, whole = np.zeros(param.shape[0]), np.zeros(param.shape[1]), np.zeros(param.shape)
    for step, grad in enumerate(grads.astype(np.float64)):
        b2 = min(config.b2, 1 - (step + 1.0) ** -0.8)
        square = grad**2 + 1e-30
        if min(param.shape) >= 32:
            rows = b2 * rows + (1 - b2) * square.mean(axis=1)
            columns = b2 * columns + (1 - b2) * square.mean(axis=0)
            update = grad / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            whole = b2 * whole + (1 - b2) * square
            update = grad / np.sqrt(whole)
        m = config.b1 * m + (1 - config.b1) * update
        param = param - factor(step) * (config.learning_rate * m + decay * param)
    return param


@pytest.mark.parametrize("convention", ["paper", "optax"])
@pytest.mark.parametrize(("name", "reference"), [("lion", lion), ("adam", adam), ("adafactor", adafactor)])
def test_optimizers_after_fifty_steps_equal_the_reference(name, reference, convention):
    config = OptimizerConfig(
        name=name, learning_rate=1e-2, b2=0.95, weight_decay=0.02, weight_decay_convention=convention,
        clip_norm=0.0, warmup_steps=WARMUP,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"kernel": (96, 160), "bias": (24, 40), "embedding": (160, 96)}  # Adafactor factors from 32 on
    names = tuple(shapes)
    params = {"txt": {n: rng.normal(size=shapes[n]).astype(np.float32) for n in names}, "mean": np.ones(3)}
    start = jax.tree.map(np.copy, params)
    grads = {n: rng.normal(size=(STEPS, *shapes[n])).astype(np.float32) for n in names}
    optimizer = make_optimizer(config, STEPS, params)
    state = optimizer.init(params)
    for step in range(STEPS):
        grad = {"txt": {n: grads[n][step] for n in names}, "mean": np.ones(3)}
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    decay = config.weight_decay * (config.learning_rate if convention == "optax" else 1)
    for n in names:
        want = reference(start["txt"][n], grads[n], config, decay if n == "kernel" else 0.0)
        # 50 float32 updates of about 1e-2 on values of about 1: each rounds by at most 6e-8.
        np.testing.assert_allclose(params["txt"][n], want, atol=5e-6)
    np.testing.assert_array_equal(params["mean"], start["mean"])  # frozen
    assert not np.allclose(params["txt"]["bias"], start["txt"]["bias"])


def layered_params(rng):
    """Parameters of two stacked layers with two heads, of a projection and of an embedding."""
    attention = "txt/encoderblock/MultiHeadDotProductAttention_0"
    shapes = {
        f"{attention}/query/kernel": (2, 12, 2, 6), f"{attention}/query/bias": (2, 2, 6),
        f"{attention}/out/kernel": (2, 2, 6, 12), "txt/encoderblock/Dense_0/kernel": (2, 12, 48),
        "txt/encoderblock/LayerNorm_0/scale": (2, 12), "txt/head/kernel": (12, 8), "txt/Embed_0/embedding": (50, 12),
        "t": (1,),
    }  # fmt: skip
    tree = {}
    for name, shape in shapes.items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return tree


def run(optimizer, params, grads):
    """Apply the gradients one after the other; the last parameters and optimizer state."""
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def is_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def optax_muon(config, schedule, params):
    axes = optax.contrib.MuonDimensionNumbers
    numbers = jax.tree.map(lambda _: None, params)
    block = numbers["txt"]["encoderblock"]
    block["MultiHeadDotProductAttention_0"]["query"]["kernel"] = axes((1,), (2, 3))
    block["MultiHeadDotProductAttention_0"]["out"]["kernel"] = axes((1, 2), (3,))
    block["Dense_0"]["kernel"] = axes((1,), (2,))
    numbers["txt"]["head"]["kernel"] = axes((0,), (1,))
    return optax.contrib.muon(
        schedule, beta=config.b1, adam_b1=config.b1, adam_b2=config.b2, weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=numbers, consistent_rms=0.2,
    )  # fmt: skip


def optax_adamw(config, schedule, params):
    return optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=is_kernel)


@pytest.mark.parametrize(("name", "reference"), [("adamw", optax_adamw), ("muon", optax_muon)])
def test_optimizers_of_optax_equal_optax_with_its_weight_decay(name, reference):
    config = OptimizerConfig(
        name=name, learning_rate=1e-2, b1=0.95, b2=0.98, weight_decay=0.5, clip_norm=0.0, warmup_steps=WARMUP
    )
    rng = np.random.default_rng(0)
    params = layered_params(rng)
    grads = [layered_params(rng) for _ in range(10)]
    factor_of_step = make_schedule(config, STEPS)
    theirs = reference(config, lambda step: config.learning_rate * factor_of_step(step), params)
    got, want = (run(o, params, grads)[0] for o in (make_optimizer(config, STEPS, params), theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)
    # The decay alone has moved the kernels by more than the tolerance.
    undecayed = run(make_optimizer(replace(config, weight_decay=0.0), STEPS, params), params, grads)[0]
    head = [tree["txt"]["head"]["kernel"] for tree in (got, undecayed)]
    assert np.abs(head[0] - head[1]).max() > 1e-2


def test_schedule_free_equals_optax_and_evaluates_its_average():
    """optax decays every parameter, so only kernels are compared."""
    config = OptimizerConfig(
        name="schedule_free", schedule="constant", learning_rate=1e-2, b1=0.9, b2=0.98, weight_decay=0.5,
        clip_norm=0.0, warmup_steps=WARMUP,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = {"txt": {"kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)}, "mean": jnp.ones(3)}
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(10)
    ]
    theirs = optax.contrib.schedule_free_adamw(
        config.learning_rate, WARMUP, config.b1, config.b2, weight_decay=config.weight_decay
    )
    got, state = run(make_optimizer(config, STEPS, params), params, grads)
    want, reference_state = run(theirs, params["txt"], [g["txt"] for g in grads])
    np.testing.assert_allclose(got["txt"]["kernel"], want["kernel"], atol=1e-6)
    average = evaluation_params(state, got)
    want_average = optax.contrib.schedule_free_eval_params(reference_state, want)
    np.testing.assert_allclose(average["txt"]["kernel"], want_average["kernel"], atol=1e-6)
    assert np.abs(average["txt"]["kernel"] - got["txt"]["kernel"]).max() > 1e-4
    np.testing.assert_array_equal(average["mean"], params["mean"])  # frozen


def test_evaluation_params_of_other_optimizers_are_the_parameters():
    params = {"kernel": jnp.ones((2, 2))}
    state = make_optimizer(OptimizerConfig(), 10, params).init(params)
    assert evaluation_params(state, params) is params


def test_muon_orthogonalizes_each_layer_by_itself():
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, b1=0.95, weight_decay=0.0, clip_norm=0.0, warmup_steps=0
    )
    params = layered_params(np.random.default_rng(0))
    grads = layered_params(np.random.default_rng(1))
    optimizer = make_optimizer(config, 10, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    attention = updates["txt"]["encoderblock"]["MultiHeadDotProductAttention_0"]
    matrices = {
        12: [*attention["query"]["kernel"].reshape(2, 12, 12), *attention["out"]["kernel"].reshape(2, 12, 12)]
    }
    matrices[48] = list(updates["txt"]["encoderblock"]["Dense_0"]["kernel"])
    for longest, group in matrices.items():
        for matrix in group:
            # Five iterations bring the singular values near 1, the update is scaled by 0.2 sqrt(longest side).
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(longest))
            assert values.min() > 0.5
            assert values.max() < 1.3


def test_matrix_axes_of_every_kernel_of_the_model():
    """The outputs of a layer's matrix are those that have a bias."""
    config = Config(text=TextConfig(variant="mu", depth=3, pooling="map"), loss=LossConfig(image_head=True))
    model = TextTower(config.text.shape, 100, 8, 24, pooling="map")
    params = jax.eval_shape(lambda: init_params(model, config, np.zeros(24)))
    shapes = dict(zip(parameter_names(params), (p.shape for p in jax.tree.leaves(params)), strict=True))
    kernels = [name for name in shapes if name.endswith("/kernel")]
    assert len(kernels) == 14
    for name in kernels:
        shape, (inputs, outputs) = shapes[name], matrix_axes(name, len(shapes[name]))
        layers = 3 if "/encoderblock/" in name else 1
        assert math.prod(shape[a] for a in inputs + outputs) * layers == math.prod(shape)
        if bias := shapes.get(name.removesuffix("kernel") + "bias"):
            assert layers * math.prod(shape[a] for a in outputs) == math.prod(bias)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipping_equals_that_of_optax(size):
    rng = np.random.default_rng(0)
    grads = {
        "a": size * rng.standard_normal((5, 7), np.float32),
        "b": size * rng.standard_normal(3, np.float32),
    }
    ours, theirs = (
        clip.update(grads, clip.init(grads))[0] for clip in (_clip(2.5), optax.clip_by_global_norm(2.5))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_clipping_of_a_gradient_that_is_not_a_number_hides_it_nowhere():
    updates, _ = _clip(2.5).update({"a": np.float32([1, np.nan]), "b": np.float32([1])}, optax.EmptyState())
    assert np.isnan(updates["a"]).all()
    assert np.isnan(updates["b"]).all()


def test_clipping_uses_the_global_norm():
    config = OptimizerConfig(name="adam", b1=0.0, b2=0.0, clip_norm=1.0, warmup_steps=0)
    params = {"kernel": jnp.zeros((2,)), "bias": jnp.zeros((1,))}
    optimizer = make_optimizer(config, 10, params)
    # With b1 = b2 = 0 Adam divides the clipped gradient by itself plus 1e-8; tiny entries show the clip.
    grads = {"kernel": jnp.array([3e9, 1.0]), "bias": jnp.array([4e9])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    clipped = 1.0 / 5e9
    np.testing.assert_allclose(updates["kernel"][1], -1e-4 * clipped / (clipped + 1e-8), rtol=1e-4)


def test_rules_set_rate_decay_and_freezing():
    params = {"txt": {n: jnp.ones((2, 2)) for n in ("a", "b", "kernel")}, "t": jnp.ones((1,))}
    config = OptimizerConfig(
        learning_rate=1.0, weight_decay=0.5, clip_norm=0.0, warmup_steps=0, freeze=("t",),
        learning_rate_scale=("txt/a=0.25", "txt/.*=2"), weight_decay_scale=("txt/b=0.5",),
    )  # fmt: skip
    optimizer = make_optimizer(config, 10, params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    got = {n: float(updates["txt"][n][0, 0]) for n in params["txt"]}
    assert got == {"a": -0.25, "b": -2.25, "kernel": -2.0}  # Lion's update is the sign of the gradient
    assert float(updates["t"][0]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"freeze": ("img/.*",)},
            "optimizer.freeze: 'img/.*' matches no parameter; use one of the names t, txt/kernel",
        ),
        ({"learning_rate_scale": ("t=fast",)}, "'t=fast' is not of the form REGEX=FACTOR"),
        ({"weight_decay_scale": ("(=1",)}, "'(=1' is not of the form REGEX=FACTOR"),
    ],
)
def test_rules_without_match_or_meaning_are_refused(options, message):
    with pytest.raises(UserError) as error:
        make_optimizer(OptimizerConfig(**options), 10, {"txt": {"kernel": np.ones(3)}, "t": np.ones(1)})
    assert message in str(error.value)
