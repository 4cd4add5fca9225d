"""The layers of an encoder as one differentiable function, for training an image tower.

Forward and backward pass are loops of their own over `lit_fast.models.encoder_pass`; `lit_fast.train.text_pass` has
those of the text tower, which also loop over microbatches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.models.encoder_pass import EncoderPass
from lit_fast.models.precision import matmul_precision
from lit_fast.models.text_tower import RowLayout

Tree = dict[str, Any]


class EncoderLayers:
    """The function (parameters stacked by layer, x) -> output of the last layer, both [n, tokens, width].

    All tokens of a row attend to each other; there is no dropout. x has the dtype of the matrix products.
    """

    def __init__(self, encoder: EncoderPass) -> None:
        self._encoder = encoder

    def __call__(self, block: Tree, x: jax.Array) -> jax.Array:
        run = jax.custom_vjp(lambda block, x: self._forward(block, x)[0])
        run.defvjp(self._forward, self._backward)
        return run(block, x)  # type: ignore[no-any-return]

    def _forward(self, block: Tree, x: jax.Array) -> tuple[jax.Array, tuple[Tree, Tree]]:
        layout = _layout(x)

        def layer(x: jax.Array, weights: Tree) -> tuple[jax.Array, Tree]:
            y, kept = self._encoder.forward(weights, x, layout, None)
            return y, _stored({"x": x, **kept})

        with matmul_precision(self._encoder.dtype):
            x, kept = lax.scan(layer, x, self._encoder.prepare(block))
        return x, (block, kept)

    def _backward(self, residuals: tuple[Tree, Tree], dy: jax.Array) -> tuple[Tree, jax.Array]:
        block, kept = residuals
        layout = _layout(dy)

        def layer(dx: jax.Array, inputs: tuple[Tree, Tree]) -> tuple[jax.Array, Tree]:
            weights, kept = inputs[0], _loaded(inputs[1])
            return self._encoder.backward(weights, kept.pop("x"), kept, dx, layout, None)

        with matmul_precision(self._encoder.dtype):
            dx, d = lax.scan(layer, dy, (self._encoder.prepare(block), kept), reverse=True)
            return self._encoder.gradients(block, d), dx


def _layout(x: jax.Array) -> RowLayout:
    """Return the layout of rows whose tokens all attend to each other."""
    first = jnp.zeros((len(x), 1), jnp.int32)
    return RowLayout(first, first + x.shape[1] - 1, None, None, None)


# bfloat16 is stored as its bits: XLA's CPU backend slices a layer out of a bfloat16 array by converting the whole array
# to float32, which triples the memory.


def _stored(kept: Tree) -> Tree:
    bits = lambda a: lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a  # noqa: E731
    return jax.tree.map(bits, kept)


def _loaded(kept: Tree) -> Tree:
    value = lambda a: lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a  # noqa: E731
    return jax.tree.map(value, kept)
