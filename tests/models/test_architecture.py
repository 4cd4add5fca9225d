"""Counts of parameters and FLOPs against the module itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lit_fast.models.architecture import Architecture, flops_per_image, parameters
from lit_fast.models.sizes import VARIANTS, Shape
from lit_fast.models.vit import ViT

SMALL = Shape(width=24, depth=3, mlp_dim=40, heads=3)
ARCHITECTURES = [
    Architecture(SMALL, 8),
    Architecture(SMALL, 8, pool="gap", class_token=False),
    Architecture(SMALL, 8, pool="gap", class_token=False, registers=4, norm_after_pool=True),
    Architecture(SMALL, 8, pool="map", class_token=False, gelu="tanh"),
    Architecture(SMALL, 8, gelu="swiglu", registers=4),
    Architecture(SMALL, 8, pool="projection", pre_norm=True, gelu="quick", projection=16),
]


def shapes(architecture, size):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(ViT(architecture).init, jax.random.key(0), images)["params"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_equal_the_module(architecture):
    leaves = jax.tree.leaves(shapes(architecture, 37))  # 37 pixels are cropped to whole patches
    assert parameters(architecture, 37) == sum(int(np.prod(leaf.shape)) for leaf in leaves)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_equal_the_traced_products(architecture):
    """The trace has two per multiply-add of every dot product and convolution."""
    size = 32
    images = jnp.zeros((1, size, size, 3))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(architecture, size))
    program = jax.make_jaxpr(lambda p, x: ViT(architecture).apply({"params": p}, x))(params, images)
    assert flops_per_image(architecture, size) == traced_flops(program.jaxpr) + skipped_flops(
        architecture, size
    )


def skipped_flops(architecture, size):
    """Count queries, attention, output and MLP of the last layer for all tokens but the pooled one."""
    if architecture.pool not in ("tok", "projection"):
        return 0
    width, _, mlp_dim, _ = architecture.shape
    length = (size // architecture.patch) ** 2 + architecture.class_token + architecture.registers
    mlp = (3 if architecture.gelu == "swiglu" else 2) * width * mlp_dim
    return (length - 1) * 2 * (2 * width**2 + 2 * length * width + mlp)


def traced_flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        out = equation.outvars[0].aval.shape if equation.outvars else ()
        if name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([left[i] for i in contracting]))
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod(kernel[:-1]))
        inner = [traced_flops(inner) for inner in jaxprs_in_params(equation.params)]
        if name == "cond":  # the forms for CPUs and other devices have equal products
            assert len(set(inner)) == 1
            inner = inner[:1]
        total += sum(inner) * equation.params.get("length", 1)
    return total


def test_b8_has_the_parameters_of_its_file():
    architecture = Architecture(VARIANTS["B"], 8)
    # AugReg's file without head has 85 807 872; the class token and its position are one array here.
    assert parameters(architecture, 224) == 85_807_872 - 768
    assert flops_per_image(architecture, 224) == pytest.approx(157e9, rel=0.01)
