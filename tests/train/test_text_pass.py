"""The training pass of the text tower has the values and gradients of the Flax modules."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_fast.models import encoder_pass
from lit_fast.models.attention import pallas_attention
from lit_fast.models.sizes import Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import embed_ids
from lit_fast.train.text_pass import TextPass

LENGTH, VOCAB, ROWS = 6, 20, 4
SHAPE = Shape(width=16, depth=3, mlp_dim=24, heads=2)
# Without optimized machine code compiling takes half the time.
QUICK = {"xla_backend_optimization_level": 0}


def tower_of(shape=SHAPE, **options):
    options = {"out_dim": 10, "max_length": LENGTH} | options
    return TextTower(shape, VOCAB, **options)


@cache
def parameters(tower):
    """Random parameters, also scales and biases; kernels have the variance of their initial values."""
    rng = np.random.default_rng(1)

    def leaf(path, shape):
        values = rng.normal(size=shape.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return values / np.sqrt(tower.shape.width)
        return 1 + 0.2 * values if name == "scale" else 0.2 * values

    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, tower.max_length), int))
    return jax.tree_util.tree_map_with_path(leaf, shapes["params"])


def rows_of(tower, packed, rows=ROWS):
    """Padded captions, or 3 per row by their true lengths."""
    rng = np.random.default_rng(2)
    inputs = {}
    if packed:
        lengths = rng.integers(1, LENGTH + 1, (rows, 3))
        inputs["lengths"] = jnp.asarray(lengths, jnp.uint16)
    width = 3 * LENGTH + 2 if packed else tower.max_length
    inputs["ids"] = jnp.asarray(rng.integers(0, VOCAB, (rows, width)), jnp.uint16)
    if tower.dropout:
        inputs["dropout_keys"] = jax.random.split(jax.random.key(3), rows)
    return inputs


def value_and_gradients(function, params, inputs, options=None):
    """Return the embeddings and the gradients of their product with fixed random numbers."""

    def loss(params, inputs):
        texts = function(params, inputs)
        return (texts * np.random.default_rng(4).normal(size=texts.shape).astype(np.float32)).sum(), texts

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, inputs)
    (_, texts), gradients = compiled.compile(compiler_options=QUICK if options is None else options)(
        params, inputs
    )
    return jax.device_get((texts, gradients))


def flax(tower):
    return lambda params, inputs: embed_ids(tower, {"txt": params}, **inputs)


def error(found, expected):
    return np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-6)


CASES = {
    "last": {},
    "one layer": {"shape": SHAPE._replace(depth=1), "microbatches": 2},
    "first": {"pooling": "first", "keep": "hidden", "microbatches": 2},
    "mean": {"pooling": "mean", "keep": "embeddings", "microbatches": 4, "dropout": 0.3},
    "max": {"pooling": "max", "eos_id": 1, "keep": "inputs", "platform": "gpu"},
    "map": {"pooling": "map", "eos_id": 1, "keep": "hidden", "microbatches": 2, "platform": "tpu"},
    "masked": {"eos_id": 1, "dropout": 0.2, "keep": "inputs", "embedding_width": 4},
    "joined": {"pack": 2, "microbatches": 2, "projected": False, "out_dim": 16},
    "packed": {"pack": 3, "eos_id": 1, "packed": True, "keep": "hidden", "microbatches": 2, "dropout": 0.1},
    "packed map": {"pack": 3, "eos_id": 1, "packed": True, "pooling": "map", "keep": "embeddings"},
}


@pytest.mark.parametrize(
    ("name", "fold"), [(n, f) for n, c in CASES.items() for f in (False, True) if f or "platform" not in c]
)
def test_text_pass_in_float32_equals_the_flax_modules(name, fold, monkeypatch):
    case = dict(CASES[name])
    monkeypatch.setattr(encoder_pass, "_CPU_TOKENS_PER_WIDTH", 0 if fold else 1000)
    keep, microbatches = case.pop("keep", "products"), case.pop("microbatches", 1)
    platform, packed = case.pop("platform", "cpu"), case.pop("packed", False)
    tower = tower_of(**case)
    params, inputs = parameters(tower), rows_of(tower, packed)
    # Without optimization, a maximum that is computed twice is not the same number, and has no gradient.
    options = {} if tower.pooling == "max" else QUICK
    embed = TextPass(tower, keep, microbatches, platform)
    texts, gradients = value_and_gradients(embed, params, inputs, options)
    expected, expected_gradients = value_and_gradients(flax(tower), params, inputs, options)
    # Float32 sums in another order: about 1e-6 of a value, some times more where terms cancel.
    np.testing.assert_allclose(texts, expected, atol=5e-6)
    scale = max(np.abs(a).max() for a in jax.tree.leaves(expected_gradients))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-4, atol=5e-6 * scale), gradients, expected_gradients
    )


@pytest.mark.parametrize("attention", ["cpu", "cpu folded", "gpu", "tpu", "equal lengths", "true lengths"])
def test_text_pass_in_bfloat16_is_as_exact_as_the_flax_modules(attention, monkeypatch):
    """Both against float32. The kernels for TPUs are interpreted."""
    monkeypatch.setattr(encoder_pass, "_CPU_TOKENS_PER_WIDTH", 0 if attention == "cpu folded" else 1000)
    kernels = attention.endswith("lengths")
    packed = attention == "true lengths"
    shape = Shape(width=32, depth=3, mlp_dim=64, heads=2)
    length = 16 if kernels else LENGTH
    tower = tower_of(shape, max_length=length, pack=8, eos_id=1 if packed else None)
    params = parameters(tower)
    rng = np.random.default_rng(5)
    inputs = {"ids": jnp.asarray(rng.integers(0, VOCAB, (16, 104 if packed else length)), jnp.uint16)}
    if packed:
        lengths = rng.integers(1, 14, (2, 8))
        lengths[0] = [16, 16, 16, 16, 16, 16, 8, 0]  # a full row, with a place without a caption
        inputs = {"ids": inputs["ids"][:2], "lengths": jnp.asarray(lengths, jnp.uint16)}
    half = tower.clone(dtype=jnp.bfloat16)
    expected = value_and_gradients(flax(tower), params, inputs)
    usual = value_and_gradients(flax(half), params, inputs)
    chosen = pallas_attention(2, 0 if packed else 16) if kernels else None
    found = value_and_gradients(
        TextPass(half, "hidden", 1, "tpu" if kernels else attention.split()[0], chosen), params, inputs
    )
    errors = [
        [error(*pair) for pair in zip(*map(jax.tree.leaves, (a, expected)), strict=True)]
        for a in (found, usual)
    ]
    # The gradient of the biases of keys is 0; what is found is rounding.
    keep = [np.linalg.norm(a) > 1e-3 for a in jax.tree.leaves(expected)]
    mine, theirs = (np.asarray(e)[keep] for e in errors)
    assert mine.mean() < 1.3 * theirs.mean()
    assert (mine < 2.5 * theirs + 1e-3).all()


@pytest.mark.parametrize("case", [{}, {"pack": 3, "eos_id": 1, "dropout": 0.1}], ids=["padded", "packed"])
def test_text_pass_has_the_same_bits_with_every_policy(case):
    """A run that is resumed where less memory is left may choose another one."""
    tower = tower_of(dtype=jnp.bfloat16, **case)
    params, inputs = parameters(tower), rows_of(tower, "pack" in case, 8)
    found = [
        value_and_gradients(TextPass(tower, keep, 2, "cpu"), params, inputs, {})
        for keep in ("products", "hidden", "inputs")
    ]
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


def test_text_pass_in_bfloat16_is_equal_with_any_number_of_microbatches():
    """Each embedding is computed from its own row alone; the gradients are float32 sums in another order."""
    tower = tower_of(dtype=jnp.bfloat16)
    params, inputs = parameters(tower), rows_of(tower, False, 8)
    one, four = (value_and_gradients(TextPass(tower, "hidden", m, "cpu"), params, inputs) for m in (1, 4))
    np.testing.assert_allclose(one[0], four[0], atol=1e-6)
    errors = jax.tree.leaves(jax.tree.map(error, four[1], one[1]))
    assert max(errors) < 1e-2  # of the bfloat16 products; products of other shapes may round otherwise
