"""The training pass against the definition of the tower, caption by caption, in NumPy's float64.

Gradients are compared along random directions, with differences of the float64 function.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.models.sizes import VARIANTS, Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.train.text_pass import TextPass

LENGTH, VOCAB, EOS, OUT = 6, 20, 1, 5
# Without optimized machine code compiling takes half the time.
QUICK = {"xla_backend_optimization_level": 0}


def norm(p, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def attend(p, queries, keys):
    """Attend from all queries [q, width] to all keys [k, width]."""
    q, k, v = (
        np.einsum("tw,whd->htd", x, p[name]["kernel"]) + p[name]["bias"][:, None]
        for name, x in (("query", queries), ("key", keys), ("value", keys))
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    y = weights / weights.sum(axis=-1, keepdims=True) @ v
    return np.einsum("htd,hdw->tw", y, p["out"]["kernel"]) + p["out"]["bias"]


def mlp(p, x):
    h = dense(p["Dense_0"], x)
    return dense(p["Dense_1"], h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))))


def embed(params, pooling, caption):
    """Return the normalized embedding of one caption, token ids [length]."""
    x = params["Embed_0"]["embedding"][caption]
    if "embedding_projection" in params:
        x = x @ params["embedding_projection"]["kernel"]
    x = x + params["pos_embedding"][0, : len(caption)]
    layers = params["Encoder_0"]["encoderblock"]
    for i in range(len(layers["LayerNorm_0"]["scale"])):
        p = jax.tree.map(lambda a: a[i], layers)  # noqa: B023
        y = norm(p["LayerNorm_0"], x)
        x = x + attend(p["MultiHeadDotProductAttention_0"], y, y)
        x = x + mlp(p["MlpBlock_0"], norm(p["LayerNorm_1"], x))
    x = norm(params["Encoder_0"]["encoder_norm"], x)
    if pooling == "map":
        p = params["MAPHead_0"]
        y = attend(p["MultiHeadDotProductAttention_0"], p["probe"][0], x)
        x = (y + mlp(p["MlpBlock_0"], norm(p["LayerNorm_0"], y)))[0]
    else:
        x = {"last": x[-1], "first": x[0], "mean": x.mean(axis=0), "max": x.max(axis=0)}[pooling]
    x = dense(params["head"], x) if "head" in params else x
    return x / np.linalg.norm(x)


def random_params(tower, rng):
    """Scales near 1 and kernels that keep the size of activations, so that no parameter is without effect."""
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, LENGTH), int))["params"]

    def leaf(path, shape):
        values = rng.normal(size=shape.shape)
        name = path[-1].key
        if name == "kernel":
            return values / np.sqrt(tower.shape.width)
        return 1 + 0.2 * values if name == "scale" else 0.5 * values

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@st.composite
def cases(draw):
    """Draw a tower, its rows and how they are computed."""
    letter = VARIANTS[draw(st.sampled_from(sorted(VARIANTS)))]  # its proportions
    heads = draw(st.sampled_from([1, 2, 4]))
    shape = Shape(16, draw(st.integers(1, 3)), 16 * letter.mlp_dim // letter.width, heads)
    padding = draw(st.sampled_from(["attended", "masked", "packed", "joined"]))
    projected = draw(st.booleans())
    tower = TextTower(
        shape,
        VOCAB,
        LENGTH,
        OUT if projected else shape.width,
        pooling=draw(st.sampled_from(["last", "first", "mean", "max", "map"])),
        eos_id=EOS if padding in ("masked", "packed") else None,
        embedding_width=draw(st.sampled_from([0, 4])),
        projected=projected,
        pack=2 if padding == "joined" else 1,
    )
    return SimpleNamespace(
        tower=tower,
        padding=padding,
        keep=draw(st.sampled_from(["products", "hidden", "inputs", "embeddings"])),
        microbatches=draw(st.sampled_from([1, 2])),
        platform=draw(st.sampled_from(["cpu", "gpu", "tpu"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def draw_rows(case, rng):
    """Return the rows of the pass and the captions in the order of its embeddings; None: a place without one."""
    ids = rng.integers(2, VOCAB, (4, LENGTH))
    if case.padding in ("attended", "joined"):
        return {"ids": ids}, list(ids)
    if case.padding == "masked":
        lengths = rng.integers(1, LENGTH + 1, 4)
        ids[np.arange(LENGTH) >= lengths[:, None] - 1] = EOS
        return {"ids": ids}, [row[:length] for row, length in zip(ids, lengths, strict=True)]
    lengths = rng.integers(1, LENGTH + 1, (4, 3))
    lengths[:2, 2] = 0
    ids = rng.integers(0, VOCAB, (4, int(lengths.sum(axis=1).max())))  # one row is full
    ends = np.cumsum(lengths, axis=1)
    captions = [
        ids[row, end - n : end] if n else None
        for row in range(4)
        for end, n in zip(ends[row], lengths[row], strict=True)
    ]
    return {"ids": ids, "lengths": lengths}, captions


@settings(max_examples=4, deadline=None)
@given(cases())
def test_text_pass_equals_the_definition_in_float64(case):
    rng = np.random.default_rng(case.seed)
    params = random_params(case.tower, rng)
    rows, captions = draw_rows(case, rng)
    weights = rng.normal(size=(len(captions), case.tower.out_dim))
    weights[[caption is None for caption in captions]] = 0

    def texts_of(params):
        none = np.zeros(case.tower.out_dim)
        return np.stack([none if c is None else embed(params, case.tower.pooling, c) for c in captions])

    run = TextPass(case.tower, case.keep, case.microbatches, case.platform)

    def loss(params, rows):
        texts = run(params, rows)
        return (texts * weights.astype(np.float32)).sum(), texts

    inputs = jax.tree.map(np.float32, params), {k: a.astype(np.uint16) for k, a in rows.items()}
    # Without optimization, a maximum that is computed twice is not the same number, and has no gradient.
    options = {} if case.tower.pooling == "max" else QUICK
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*inputs).compile(options)
    (_, texts), gradients = jax.device_get(compiled(*inputs))
    # Float32 rounding, about 1e-6 of a value.
    has_caption = [caption is not None for caption in captions]
    np.testing.assert_allclose(texts[has_caption], texts_of(params)[has_caption], atol=2e-5)

    scale = np.sqrt(sum((a.astype(float) ** 2).sum() for a in jax.tree.leaves(gradients)))
    for _ in range(3):
        direction = jax.tree.map(lambda a: rng.normal(size=a.shape), params)
        ahead, behind = (
            (texts_of(jax.tree.map(lambda a, d: a + step * d, params, direction)) * weights).sum()  # noqa: B023
            for step in (1e-6, -1e-6)
        )
        found = sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
        np.testing.assert_allclose(found, (ahead - behind) / 2e-6, atol=1e-4 * scale)
