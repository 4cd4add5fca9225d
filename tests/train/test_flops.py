"""The formula for a step's FLOPs against the products in the traced program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_fast.text import TextTower
from lit_fast.variants import Shape
from train.flops import step_flops


def products(jaxpr):
    """Operations of all matrix products, two per multiply-add; a scan's body counts as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[i] for i in contracted]))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += equation.params.get("length", 1) * products(inner)
    return total


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
def test_formula_counts_every_product(options):
    model = TextTower(
        **{"shape": Shape(24, 3, 40, 2), "vocab_size": 50, "max_length": 7, "out_dim": 10} | options
    )
    ids = jax.ShapeDtypeStruct((5, 7), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    # Three times the forward products: once forward, twice backward. No images: no loss.
    assert step_flops(model, 5, 0) == 3 * products(jax.make_jaxpr(model.apply)(params, ids).jaxpr)
