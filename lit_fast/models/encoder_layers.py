"""The layers of an encoder as one differentiable function, for training an image tower.

Forward and backward pass are loops of their own over `lit_fast.models.encoder_pass`; `lit_fast.train.text_pass` has
those of the text tower, which also loop over microbatches.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from lit_fast.models.encoder_pass import EncoderPass
from lit_fast.models.precision import from_bits, matmul_precision, to_bits
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
        layout = RowLayout.unpacked(x[..., 0], eos_id=None)

        def layer(x: jax.Array, weights: Tree) -> tuple[jax.Array, Tree]:
            y, kept = self._encoder.forward(weights, x, layout, None)
            return y, jax.tree.map(to_bits, {"x": x, **kept})

        with matmul_precision(self._encoder.dtype):
            x, kept = lax.scan(layer, x, self._encoder.prepare(block, _tokens(x)))
        return x, (block, kept)

    def _backward(self, residuals: tuple[Tree, Tree], dy: jax.Array) -> tuple[Tree, jax.Array]:
        block, kept = residuals
        layout = RowLayout.unpacked(dy[..., 0], eos_id=None)

        def layer(dx: jax.Array, inputs: tuple[Tree, Tree]) -> tuple[jax.Array, Tree]:
            weights, kept = inputs[0], jax.tree.map(from_bits, inputs[1])
            return self._encoder.backward(weights, kept.pop("x"), kept, dx, layout, None)

        with matmul_precision(self._encoder.dtype):
            dx, d = lax.scan(layer, dy, (self._encoder.prepare(block, _tokens(dy)), kept), reverse=True)
            return self._encoder.gradients(block, d), dx


def _tokens(x: jax.Array) -> int:
    return x.shape[0] * x.shape[1]
