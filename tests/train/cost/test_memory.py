"""The choice of `text.keep = "auto"`, from shapes alone and against the compiler."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lit_fast.config import Config, ImageConfig, OptimizerConfig, StreamConfig, TextConfig
from lit_fast.errors import UserError
from lit_fast.models.architecture import Architecture
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.runtime import make_mesh
from lit_fast.train.cost.aot import compile_step
from lit_fast.train.cost.memory import choose_remat
from lit_fast.train.step import abstract_training

MIB = 2**20
CONFIG = Config(
    steps=10,
    text=TextConfig(width=64, depth=3, heads=2, dtype="float32"),
    stream=StreamConfig(global_batch=512),
    optimizer=OptimizerConfig(name="adam", warmup_steps=1),
)


def build(text):
    return TextTower(text.shape, 100, 8, 16, dtype=jnp.dtype(text.dtype))


def choose(limit, config=CONFIG, devices=2):
    training = abstract_training(build(config.text), config)
    return choose_remat(config, build, make_mesh(jax.devices()[:devices]), *training, limit)


def test_choose_remat_stores_more_residuals_with_more_memory():
    order = ["products", "hidden", "inputs", "embeddings"]
    found = [choose(mib * MIB) for mib in (7, 9, 12, 16, 18, 21, 25, 60)]
    assert all(f.bytes <= f.limit for f in found)
    policies = [order.index(f.text.keep) for f in found]
    assert policies == sorted(policies, reverse=True)
    assert set(policies) == set(range(4)), "each policy is chosen at some limit"
    assert all(256 % f.text.microbatches == 0 for f in found)


def test_choose_remat_refuses_a_batch_that_does_not_fit():
    with pytest.raises(
        UserError, match=r"global_batch 512 does not fit: a step needs at least 0\.\d+ GiB per device"
    ) as caught:
        choose(MIB // 4)
    assert "\n" not in str(caught.value)


def test_choose_remat_leaves_a_given_policy():
    text = replace(CONFIG.text, keep="inputs", microbatches=4)
    assert choose(MIB, replace(CONFIG, text=text)).text == text


def test_choose_remat_with_a_prime_number_of_texts():
    found = choose(1024 * MIB, replace(CONFIG, stream=StreamConfig(global_batch=2 * 251)))
    assert 251 % found.text.microbatches == 0


@pytest.mark.parametrize("keep", ["products", "embeddings"])
def test_memory_estimate_is_near_the_compilers(keep):
    mesh = make_mesh(jax.devices()[:2])
    config = replace(CONFIG, text=replace(CONFIG.text, keep=keep, microbatches=8))
    estimate = choose_remat(
        config, build, mesh, *abstract_training(build(config.text), config), 1024 * MIB
    ).bytes
    made = compile_step(build(config.text), config, mesh, *abstract_training(build(config.text), config))
    # Which buffers share memory is unknown to the estimate.
    assert 0.5 < estimate / (made.bytes) < 2


def test_bfloat16_residuals_take_two_bytes():
    """Residuals dominate this step; XLA's CPU backend would also store them in float32."""
    mesh = make_mesh(jax.devices()[:2])
    text = replace(CONFIG.text, keep="hidden", microbatches=8, depth=9, dtype="bfloat16")
    config = replace(CONFIG, text=text, stream=StreamConfig(global_batch=4096))
    made = compile_step(build(text), config, mesh, *abstract_training(build(text), config))
    assert made.bytes < 1.1 * choose(1024 * MIB, config).bytes


IMAGE = ImageTower(
    Architecture(Shape(64, 3, 256, 2), 8, "map", "tanh", class_token=False), 32, (0.5,) * 3, (0.5,) * 3
)


def build_wide(text):
    return build(text).clone(out_dim=IMAGE.width)


def choose_both(limit, config):
    training = abstract_training(build_wide(config.text), config, IMAGE)
    mesh = make_mesh(jax.devices()[:2])
    return choose_remat(config, build_wide, mesh, *training, limit, IMAGE), training, mesh


def test_choose_remat_covers_both_towers():
    config = replace(CONFIG, image=ImageConfig(train="scratch", dtype="float32"))
    order = ["products", "hidden", "inputs", "embeddings"]
    found = [choose_both(mib * MIB, config)[0] for mib in (16, 24, 40, 80, 160)]
    assert all(f.bytes <= f.limit for f in found)
    for policies in ([f.text.keep for f in found], [f.image.keep for f in found]):
        numbers = [order.index(keep) for keep in policies]
        assert numbers == sorted(numbers, reverse=True)
        assert len(set(numbers)) > 1
    assert found[0].record["image_keep"] == found[0].image.keep
    given = replace(config, image=replace(config.image, keep="inputs", microbatches=4))
    assert choose_both(80 * MIB, given)[0].image == given.image


@pytest.mark.parametrize("keep", ["hidden", "embeddings"])
def test_memory_estimate_of_both_towers_is_near_the_compilers(keep):
    text = replace(CONFIG.text, keep=keep, microbatches=8)
    image = ImageConfig(train="scratch", dtype="float32", keep=keep, microbatches=8)
    config = replace(CONFIG, text=text, image=image)
    found, training, mesh = choose_both(1024 * MIB, config)
    made = compile_step(build_wide(text), config, mesh, *training, IMAGE)
    assert 0.5 < found.bytes / made.bytes < 2  # as for the text tower
