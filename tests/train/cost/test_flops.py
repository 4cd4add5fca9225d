"""The formula for a step's FLOPs against the products in the traced program."""

import jax
import jax.numpy as jnp
import pytest

from lit_fast.config import LossConfig, TextConfig
from lit_fast.losses.accumulate import LossParams
from lit_fast.losses.contrastive import contrastive_loss
from lit_fast.losses.pairs import make_sides
from lit_fast.models.architecture import Architecture
from lit_fast.models.image_tower import ImageTower
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.runtime import REPLICATED, SHARDED, make_mesh, shard_map
from lit_fast.train.cost.flops import program_flops, step_flops
from lit_fast.train.text_pass import TextPass


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "first"},
        {"pooling": "max"},
        {"pooling": "map"},
        {"embedding_width": 6},
        {"projected": False, "out_dim": 24},
        {"eos_id": 1},
    ],
)
def test_step_flops_counts_every_product_of_the_tower(options):
    model = TextTower(
        **{"shape": Shape(24, 3, 40, 2), "vocab_size": 50, "max_length": 7, "out_dim": 10} | options
    )
    ids = jax.ShapeDtypeStruct((5, 7), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    # Three times the forward products: once forward, twice backward. No images: no loss.
    assert step_flops(model, 5, 0) == 3 * program_flops(jax.make_jaxpr(model.apply)(params, ids).jaxpr)


@pytest.mark.parametrize("pool", ["gap", "tok", "map"])
def test_step_flops_of_a_trained_image_tower_are_three_times_its_forward_pass(pool):
    image = ImageTower(Architecture(Shape(24, 3, 40, 2), 8, pool, "tanh"), 32, (0.5,) * 3, (0.5,) * 3)
    model = TextTower(Shape(24, 3, 40, 2), vocab_size=50, max_length=7, out_dim=24)
    params = jax.eval_shape(image.init, jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((6, 32, 32, 3), jnp.uint8)
    tower = 3 * program_flops(jax.make_jaxpr(image.features)(params, pixels).jaxpr)
    both_gradients = 3 * 2 * 12 * 6 * 24
    assert step_flops(model, 12, 6, image=image) == step_flops(model, 12, 0) + tower + both_gradients


@pytest.mark.parametrize("image_head", [False, True])
@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ({}, 0),
        ({"same_caption": "mask"}, 0),
        ({"negatives": "random", "negatives_per_positive": 2.0}, 0),
        ({"name": "softmax"}, 1),
        ({"negatives": "hardest", "negatives_per_positive": 2.0}, 3),
    ],
)
def test_step_flops_counts_the_loss_without_recomputation(options, rounds, image_head):
    """The program computes all pairs `rounds` more times, which the formula does not count."""
    texts, images, width = 12, 6, 10
    config = LossConfig(**options, image_head=image_head)

    def loss(params, features, rows, ids, seeds):
        sides = make_sides(config, 1, features, rows, len(ids) // len(rows), lambda: ids, seeds)
        return jax.value_and_grad(lambda p: contrastive_loss(config, 1, p, *sides)[0])(params)

    params = LossParams(
        texts=jnp.zeros((texts, width)),
        log_scale=jnp.zeros(()),
        bias=jnp.zeros(()),
        head=jnp.eye(width) if image_head else None,
    )
    batch = (
        jnp.zeros((images, width)),
        jnp.zeros(images, int),
        jnp.zeros((texts, 3), int),
        jnp.zeros(2, "uint32"),
    )
    one = make_mesh(jax.devices()[:1])
    specs = (REPLICATED, SHARDED, SHARDED, SHARDED, REPLICATED)
    program = jax.make_jaxpr(shard_map(loss, one, specs))(params, *batch)
    model = TextTower(shape=Shape(24, 3, 40, 2), vocab_size=50, max_length=7, out_dim=width)
    formula = step_flops(model, texts, images, image_head) - step_flops(model, texts, 0)
    again = 2 * texts * images * width + (2 * images * width**2 if image_head else 0)
    assert program_flops(program.jaxpr) == formula + rounds * again


@pytest.mark.parametrize(
    ("keep", "share"),
    [("products", 0.01), ("hidden", 0.09), ("inputs", 0.23), ("embeddings", 0.33)],
)
def test_recomputation_of_each_remat_policy(keep, share):
    """The shares in the help of `text.keep`, for the L tower with 16 tokens."""
    text = TextConfig(variant="L", depth=12, keep=keep)
    model = TextTower(text.shape, 32_000, 16, 768)
    ids = jax.ShapeDtypeStruct((512, 16), jnp.int32)  # many: the folded weights are computed once a step
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    embed = TextPass(model, keep, 1, "gpu")
    gradient = jax.make_jaxpr(jax.grad(lambda params, ids: embed(params, {"ids": ids}).sum()))
    again = program_flops(gradient(params, ids).jaxpr) / step_flops(model, 512, 0) - 1
    # Rounded to 1 %.
    assert abs(again - share) < 0.006
