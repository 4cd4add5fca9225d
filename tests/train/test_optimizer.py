"""Optimizer and schedule against short float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lit_fast.config import OptimizerConfig
from lit_fast.errors import UserError
from lit_fast.train.optimizer import make_optimizer, make_schedule

STEPS, WARMUP = 50, 5


def factor(step):
    progress = min(max((step - WARMUP) / (STEPS - WARMUP), 0), 1)
    return 0.5 * (1 + np.cos(np.pi * progress)) * min(1, step / WARMUP)


def test_schedule_values_of_the_recipe():
    # T = 65000, W = 6500; values of big_vision's schedule. float32 cosine: absolute error about 1e-7.
    want = {0: 0.0, 1: 1.538e-4, 6499: 0.99985, 6500: 1.0, 35750: 0.5, 64999: 7e-10}
    schedule = make_schedule(OptimizerConfig(warmup_steps=6500), 65000)
    for step, value in want.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-4, abs=2e-7)
    assert float(make_schedule(OptimizerConfig(warmup_steps=0), 10)(0)) == 1.0


def test_linear_and_rsqrt_schedules():
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
def test_fifty_steps_equal_the_reference(name, reference, convention):
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


def test_the_papers_numbers_in_both_conventions():
    """Lion 1e-4 with 1e-7 in the paper's convention is optax.lion(1e-4, weight_decay=1e-3)."""
    config = OptimizerConfig(clip_norm=0.0, warmup_steps=0)
    params = {"kernel": jnp.full((4, 4), 100.0)}
    grads = {"kernel": jnp.ones((4, 4))}
    ours = make_optimizer(config, 10, params)
    theirs = optax.lion(1e-4, weight_decay=1e-3)
    got = ours.update(grads, ours.init(params), params)[0]["kernel"]
    want = theirs.update(grads, theirs.init(params), params)[0]["kernel"]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    config = OptimizerConfig(name="adam", b1=0.0, b2=0.0, clip_norm=1.0, warmup_steps=0)
    params = {"kernel": jnp.zeros((2,)), "bias": jnp.zeros((1,))}
    optimizer = make_optimizer(config, 10, params)
    # With b1 = b2 = 0 Adam divides the clipped gradient by itself plus 1e-8; tiny entries show the clip.
    grads = {"kernel": jnp.array([3e9, 1.0]), "bias": jnp.array([4e9])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    clipped = 1.0 / 5e9
    np.testing.assert_allclose(updates["kernel"][1], -1e-4 * clipped / (clipped + 1e-8), rtol=1e-4)


def test_rules_scale_the_rate_choose_the_decay_and_freeze():
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
    ("options", "said"),
    [
        (
            {"freeze": ("img/.*",)},
            "optimizer.freeze: 'img/.*' matches no parameter; use one of the names t, txt/kernel",
        ),
        ({"learning_rate_scale": ("t=fast",)}, "'t=fast' is not of the form REGEX=FACTOR"),
        ({"weight_decay_scale": ("(=1",)}, "'(=1' is not of the form REGEX=FACTOR"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(options, said):
    with pytest.raises(UserError) as error:
        make_optimizer(OptimizerConfig(**options), 10, {"txt": {"kernel": np.ones(3)}, "t": np.ones(1)})
    assert said in str(error.value)
