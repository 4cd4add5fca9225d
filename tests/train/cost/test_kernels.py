"""Cycles of the attention kernels."""

import jax
import jax.numpy as jnp
import pytest

from lit_fast.models.packed_attention import backward, forward, kernel_name
from lit_fast.train.cost.kernels import BUNDLES, attention_cycles


def test_cycles_of_the_one_day_recipe_are_bundles_by_rows_of_a_core():
    forward = attention_cycles("v4", kernel_name("forward", 16, 16, 64), ["bf16[256,3072,128]"])
    assert forward == 128 * BUNDLES["v4"]["forward", 16]  # two cores
    backward = attention_cycles(
        "v5e", kernel_name("backward", None, 12, 64), ["bf16[256,2304,128]", "bf16[256,768,128]"]
    )
    assert backward == 256 * BUNDLES["v5e"]["backward", None] * 12 / 16
    blocks = attention_cycles("v6e", kernel_name("forward", 16, 16, 64), ["bf16[8,3072,256]"])
    assert blocks == 16 * BUNDLES["v6e"]["forward", 16]


@pytest.mark.parametrize(
    ("chip", "name", "shape"),
    [
        ("v3", kernel_name("forward", 16, 16, 64), "bf16[256,3072,128]"),  # the chip is not listed
        ("v4", kernel_name("forward", 32, 16, 64), "bf16[256,3072,128]"),  # the length
        ("v4", kernel_name("forward", 16, 16, 80), "bf16[256,3840,128]"),  # the head size
        ("v4", kernel_name("forward", None, 16, 64), "bf16[256,3072,256]"),  # masked rows of another length
        ("v4", "ragged_dot", "bf16[256,3072,128]"),
        ("v4", kernel_name("forward", 16, 16, 64), "f32[]"),
    ],
)
def test_cycles_of_what_was_not_counted_are_unknown(chip, name, shape):
    assert attention_cycles(chip, name, [shape]) is None


@pytest.mark.parametrize("length", [16, None])
def test_kernels_in_a_program_have_their_names(length):
    qkv, g = jnp.zeros((1, 96, 128), jnp.bfloat16), jnp.zeros((1, 32, 128), jnp.bfloat16)
    layout = length or jnp.zeros((1, 128), jnp.int32)
    program = str(
        jax.make_jaxpr(lambda u: (forward(u, layout, 2), backward(u, layout, 2, g, jnp.zeros(96))))(qkv)
    )
    for direction in ("forward", "backward"):
        assert kernel_name(direction, length, 2, 16) in program
