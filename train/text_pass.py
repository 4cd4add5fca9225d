"""The training pass of the text tower: the embeddings of a device's captions, differentiable by the parameters.

A device embeds its captions in equal microbatches. Forward and backward pass are a pair of loops over microbatches and
layers of their own, not autodiff's: what a layer keeps is written once, to its place in arrays of all microbatches and
layers, and the gradients are added up in place. `lit_fast.models.encoder_pass` has the layers; token embeddings, the
last layer of a tower that pools one token, and the pooling are the Flax modules, differentiated by JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lit_fast.config import TextConfig
from lit_fast.models.attention import Attention, pallas_attention, xla_attention
from lit_fast.models.encoder_pass import KEPT, EncoderPass
from lit_fast.models.packed_attention import EQUAL_LENGTHS, refusal
from lit_fast.models.precision import from_bits, to_bits
from lit_fast.models.text_tower import ENCODER, EPSILON, GELU, TABLE, RowLayout, TextTower
from lit_fast.models.transformer import EncoderBlock, LayerNorm, fold_keys
from lit_fast.models.two_towers import Params
from lit_fast.runtime import AXIS
from lit_fast.utils.normalize import normalize
from lit_fast.utils.output import status

DeviceBatch = dict[str, jax.Array]
Tree = dict[str, Any]


def embed_texts(
    model: TextTower,
    text: TextConfig,
    params: Params,
    batch: DeviceBatch,
    key: jax.Array,
    platform: str,
) -> jax.Array:
    """Embed this device's captions in their order, normalized, float32 [n * captions, width].

    Dropout of a row depends on `key` and the row's position in the global batch. So neither microbatches nor, where a
    row is one caption, the number of devices change it.

    Args:
      platform: of the devices, "cpu", "tpu" or "gpu".
    """
    attention = None  # XLA's
    if text.attention == "pallas":
        tokens = batch["ids"].shape[1] if "lengths" in batch else 0
        if reason := kernel_refusal(model, tokens):  # a batch whose captions need longer rows than planned
            status(f"attention: XLA's form for these rows; {reason}")
        else:
            attention = pallas_attention(model.shape.heads, equal_captions(model))
    rows = {name: array for name, array in batch.items() if name in ("ids", "lengths")}
    if text.dropout:
        positions = lax.axis_index(AXIS) * len(batch["ids"]) + jnp.arange(len(batch["ids"]))
        rows["dropout_keys"] = jax.vmap(partial(jax.random.fold_in, key))(positions)
    texts = TextPass(model, text.keep, text.microbatches, platform, attention)(params["txt"], rows)
    return texts[batch["slots"]] if "slots" in batch else texts


def equal_captions(model: TextTower) -> int:
    """Return the tokens of every caption where the kernels need no masks; 0: masks separate the captions."""
    return model.max_length if model.eos_id is None and model.max_length in EQUAL_LENGTHS else 0


def kernel_refusal(model: TextTower, row_tokens: int) -> str:
    """Return why the attention kernels cannot serve the rows of a tower; empty: they can.

    Args:
      row_tokens: of rows that are packed by true lengths; 0: padded captions are packed.
    """
    if model.pack == 1:
        return "text.pack is 1, and the kernels are for packed rows"
    if model.shape.depth == 1 and model.pooling in ("first", "last"):
        return "the only layer pools a token"
    tokens = row_tokens or model.pack * model.max_length
    return refusal(model.shape.heads, model.shape.width // model.shape.heads, tokens, model.dtype)


class _Rows(NamedTuple):
    """One microbatch."""

    ids: jax.Array  # int32 [n, tokens]
    layout: RowLayout
    keys: jax.Array | None  # PRNG keys [n] of dropout

    @property
    def encoder_keys(self) -> jax.Array | None:
        return fold_keys(self.keys, 1)


class _Ends(NamedTuple):
    """The parameters outside the loop over the layers."""

    small: Tree  # of `TextTower`, without table and encoder
    norm: Tree  # of the encoder
    last: Tree  # of the last layer, if it is outside the loop


class _Kept(NamedTuple):
    """What the backward pass reads."""

    params: Tree
    rows: Tree  # by microbatch
    weights: Tree  # of `EncoderPass.prepare`
    layers: Any  # arrays [microbatches, layers, ...], of "x" one more; None: they are computed again


class TextPass:
    """The function (params of the tower, rows) -> normalized embeddings float32 [captions, width].

    Rows are ids int [n, tokens], perhaps lengths int [n, k] and dropout_keys [n], as of `TextTower`.
    """

    def __init__(
        self,
        model: TextTower,
        keep: str,
        microbatches: int,
        platform: str,
        attention: Attention | None = None,
    ) -> None:
        """Set up the pass; arguments as of `embed_texts` and `TextConfig`."""
        self._model, self._microbatches = model, microbatches
        self._recompute = keep == "embeddings"
        if attention is None:
            attention = xla_attention(model.shape.heads, joined=platform != "tpu")
        self._encoder = EncoderPass(
            shape=model.shape,
            gelu=GELU,
            epsilon=EPSILON,
            dropout=model.dropout,
            dtype=jnp.dtype(model.dtype),
            keep=keep if keep in KEPT else "products",
            platform=platform,
            attention=attention,
        )
        self._pools_token = model.pooling in ("first", "last")
        self._layers = model.shape.depth - self._pools_token
        self._block = EncoderBlock(model.shape, GELU, EPSILON, model.dropout, model.dtype, parent=None)
        self._norm = LayerNorm(epsilon=EPSILON, dtype=jnp.float32, parent=None)

    def __call__(self, params: Tree, rows: dict[str, jax.Array]) -> jax.Array:
        """Embed the rows."""
        run = jax.custom_vjp(lambda params, rows: self._forward(params, rows)[0])
        run.defvjp(self._forward, self._backward)
        return run(params, rows)

    # --- the two loops

    def _forward(self, params: Tree, rows: dict[str, jax.Array]) -> tuple[jax.Array, _Kept]:
        parts = {name: a.reshape(self._microbatches, -1, *a.shape[1:]) for name, a in rows.items()}
        weights = self._encoder.prepare(self._scanned(params), rows["ids"].size)
        ends = self._ends(params)
        first = self._rows(_at(parts, 0))
        shapes = jax.eval_shape(lambda: self._begin(params, first))
        slots = 1 if self._recompute else self._microbatches
        layers = self._empty(weights, first, shapes, slots)
        texts = jnp.zeros((self._microbatches, *jax.eval_shape(self._end, ends, shapes, first).shape))

        def microbatch(i: Any, carry: Any) -> Any:
            texts, layers = carry
            rows, slot = self._rows(_at(parts, i)), 0 if self._recompute else i
            x, layers = self._run_layers(weights, self._begin(params, rows), rows, layers, slot)
            return lax.dynamic_update_index_in_dim(texts, self._end(ends, x, rows), i, 0), layers

        texts, layers = lax.fori_loop(0, self._microbatches, microbatch, (texts, layers))
        kept = _Kept(params, parts, weights, None if self._recompute else layers)
        return texts.reshape(-1, texts.shape[-1]), kept

    def _backward(self, kept: _Kept, dtexts: jax.Array) -> tuple[Tree, None]:
        params, parts, weights = kept.params, kept.rows, kept.weights
        dtexts = dtexts.reshape(self._microbatches, -1, dtexts.shape[-1])
        ends = self._ends(params)
        table = params[TABLE]["embedding"]

        def microbatch(i: Any, sums: Any) -> Any:
            dweights, dends, dtable = sums
            rows, slot, layers = self._rows(_at(parts, i)), i, kept.layers
            if self._recompute:
                slot, x = 0, self._begin(params, rows)
                x, layers = self._run_layers(weights, x, rows, self._empty(weights, rows, x, 1), slot)
            else:
                x = _get(layers["x"], slot, self._layers)
            _, pull = jax.vjp(lambda ends, x: self._end(ends, x, rows), ends, x)
            some, dx = pull(_at(dtexts, i))
            dends = jax.tree.map(jnp.add, dends, some)

            def layer(j: Any, carry: Any) -> Any:
                dx, dweights = carry
                index = self._layers - 1 - j
                kept = jax.tree.map(lambda all: _get(all, slot, index), layers)
                dx, d = self._encoder.backward(
                    _at(weights, index),
                    kept.pop("x"),
                    kept,
                    dx,
                    rows.layout,
                    fold_keys(rows.encoder_keys, index),
                )
                return dx, jax.tree.map(partial(self._add, index=index), dweights, d)

            dx, dweights = self._loop(layer, (dx, dweights))
            embed = lambda small, tokens: self._embed(small, tokens, rows)  # noqa: E731
            _, pull = jax.vjp(embed, ends.small, table[rows.ids])
            dsmall, dtokens = pull(dx)
            dends = dends._replace(small=jax.tree.map(jnp.add, dends.small, dsmall))
            return dweights, dends, dtable.at[rows.ids].add(dtokens)

        # Folded kernels have other gradients than those of the last layer; else these get a place at their end.
        appended = self._pools_token and bool(weights["norms"])
        zeros = lambda a, more=0: jnp.zeros((len(a) + more, *a.shape[1:]), jnp.float32)  # noqa: E731
        sums = jax.tree.map(partial(zeros, more=appended), weights), *jax.tree.map(zeros, (ends, table))
        dweights, dends, dtable = lax.fori_loop(0, self._microbatches, microbatch, sums)
        last = jax.tree.map(lambda a: a[None], dends.last)
        if appended:
            dweights = jax.tree.map(lambda all, a: all.at[-1:].set(a), dweights, self._encoder.arranged(last))
        block = self._encoder.gradients(self._scanned(params), dweights)
        if self._pools_token and not appended:
            block = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), block, last)
        encoder = {"encoderblock": block, "encoder_norm": dends.norm}
        return {TABLE: {"embedding": dtable}, ENCODER: encoder, **dends.small}, None

    def _add(self, total: jax.Array, a: jax.Array, *, index: Any) -> jax.Array:
        """Add the gradient of a layer to the sum over the microbatches."""
        if self._microbatches > 1:
            a = lax.dynamic_index_in_dim(total, index, 0, False) + a
        return lax.dynamic_update_index_in_dim(total, a, index, 0)

    # --- before, between and after the layers

    def _scanned(self, params: Tree) -> Tree:
        """Return the parameters of the layers in the loop."""
        return jax.tree.map(lambda a: a[: self._layers], params[ENCODER]["encoderblock"])

    def _ends(self, params: Tree) -> _Ends:
        block = params[ENCODER]["encoderblock"]
        return _Ends(
            {name: tree for name, tree in params.items() if name not in (TABLE, ENCODER)},
            params[ENCODER]["encoder_norm"],
            jax.tree.map(lambda a: a[-1], block) if self._pools_token else {},
        )

    def _rows(self, part: dict[str, jax.Array]) -> _Rows:
        keys = part.get("dropout_keys")
        ids = part["ids"].astype(jnp.int32)
        ids, layout = self._model.rows(ids, part.get("lengths"), joined=keys is None)
        return _Rows(ids, layout, keys)

    def _begin(self, params: Tree, rows: _Rows) -> jax.Array:
        return self._embed(self._ends(params).small, params[TABLE]["embedding"][rows.ids], rows)

    def _embed(self, small: Tree, tokens: jax.Array, rows: _Rows) -> jax.Array:
        x = self._model.apply({"params": small}, tokens, rows.layout, rows.keys, method="embed")
        return jnp.asarray(x).astype(self._encoder.dtype)

    def _end(self, ends: _Ends, x: jax.Array, rows: _Rows) -> jax.Array:
        """Return the normalized embeddings, of the output of the loop."""
        layout = rows.layout
        if self._pools_token:
            keys = fold_keys(rows.encoder_keys, self._layers)
            positions = self._model.output_positions(layout)
            x = self._block.apply({"params": ends.last}, x, layout.attention_mask, positions, keys)  # type: ignore[assignment]
        x = self._norm.apply({"params": ends.norm}, x)  # type: ignore[assignment]
        return normalize(jnp.asarray(self._model.apply({"params": ends.small}, x, layout, method="pool")))

    # --- what the layers keep

    def _run_layers(
        self, weights: Tree, x: jax.Array, rows: _Rows, layers: Tree, slot: Any
    ) -> tuple[jax.Array, Tree]:
        """Run the layers of the loop; `layers` holds what they keep, at `slot`.

        A layer reads its input from there: a carry of its own would be a second copy.
        """

        def layer(index: Any, layers: Tree) -> Tree:
            keys = fold_keys(rows.encoder_keys, index)
            x = _get(layers["x"], slot, index)
            y, kept = self._encoder.forward(_at(weights, index), x, rows.layout, keys)
            rest = {name: all for name, all in layers.items() if name != "x"}
            rest = jax.tree.map(lambda all, a: _put(all, a, slot, index), rest, kept)
            return {"x": _put(layers["x"], y, slot, index + 1), **rest}

        layers = self._loop(layer, layers | {"x": _put(layers["x"], x, slot, 0)})
        return _get(layers["x"], slot, self._layers), layers

    def _loop(self, layer: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Run `layer(index, carry)` for all layers of the loop: there is none in a tower of one layer."""
        return lax.fori_loop(0, self._layers, layer, carry) if self._layers else carry

    def _empty(self, weights: Tree, rows: _Rows, x: Any, slots: int) -> Tree:
        """Return arrays, not initialized, for what the layers keep; "x" has a place for the output of the last one."""
        new = lambda a, *axes: lax.empty((slots, *axes, *a.shape), jax.eval_shape(to_bits, a).dtype)  # noqa: E731
        inputs = {"x": new(x, self._layers + 1)}
        if not self._layers:
            return inputs
        layer = lambda x: self._encoder.forward(_at(weights, 0), x, rows.layout, rows.keys)[1]  # noqa: E731
        return inputs | jax.tree.map(lambda a: new(a, self._layers), jax.eval_shape(layer, x))


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)


def _put(all: jax.Array, a: jax.Array, *index: Any) -> jax.Array:
    return lax.dynamic_update_slice(all, to_bits(a)[(None,) * len(index)], (*index, *(0,) * a.ndim))


def _get(all: jax.Array, *index: Any) -> jax.Array:
    rest = all.shape[len(index) :]
    a = lax.dynamic_slice(all, (*index, *(0,) * len(rest)), (*(1,) * len(index), *rest))
    return from_bits(a.reshape(rest))
