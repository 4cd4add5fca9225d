"""The text tower against a float64 reference, its initialization and its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.config import TextConfig
from lit_fast.errors import UserError
from lit_fast.models.sizes import VARIANTS, Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.models.transformer import dropout
from lit_fast.models.two_towers import text_tower as make_text_tower
from tests.reference import text_tower
from tests.trained import words

SHAPE = Shape(width=32, depth=3, mlp_dim=64, heads=4)


def perturbed_params(tower, seed=0):
    """Return parameters in which every one matters, biases and norms too."""
    rng = np.random.default_rng(seed)
    ids = jnp.zeros((1, tower.max_length), jnp.int32)
    params = jax.jit(tower.init)(jax.random.key(seed), ids)["params"]
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pooling", ["last", "first", "mean", "max", "map"])
def test_tower_equals_the_float64_reference(pooling, masked):
    tower = TextTower(SHAPE, 50, 6, 12, pooling=pooling, eos_id=1 if masked else None)
    ids = np.random.default_rng(0).integers(2, 50, (4, 6))
    ids[1, 3:] = ids[2, 1:] = ids[3, :] = 1  # end of sentence and padding, down to an empty caption
    ids[0, 5] = 1
    params = perturbed_params(tower)
    assert ("MAPHead_0" in params) == (pooling == "map")
    mask = np.arange(6) <= np.array([5, 3, 1, 0])[:, None] if masked else None
    got = jax.jit(tower.apply)({"params": params}, ids)
    want = text_tower(ids, jax.tree.map(np.float64, params), pooling, mask)
    np.testing.assert_allclose(got, want, atol=3e-5)  # outputs of about 1, three float32 layers


@pytest.mark.parametrize("options", [{"embedding_width": 8}, {"projected": False}])
def test_tower_with_narrow_table_or_no_head_equals_the_reference(options):
    tower = TextTower(SHAPE, 50, 6, 32, **options)
    params = perturbed_params(tower)
    ids = np.random.default_rng(0).integers(0, 50, (4, 6))
    want = text_tower(ids, jax.tree.map(np.float64, params), "last")
    np.testing.assert_allclose(jax.jit(tower.apply)({"params": params}, ids), want, atol=3e-5)


def test_narrow_table_is_initialized_at_the_scale_of_the_plain_one():
    tower = TextTower(Shape(768, 1, 64, 12), 5000, 4, 8, embedding_width=96)
    p = jax.jit(tower.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert p["Embed_0"]["embedding"].shape == (5000, 96)
    assert p["embedding_projection"].keys() == {"kernel"}
    embeddings = p["Embed_0"]["embedding"] @ p["embedding_projection"]["kernel"]
    # 5000 x 96 and 96 x 768 independent normals: the standard deviation is known to about 1/sqrt(2 x 73 728).
    assert np.std(embeddings) == pytest.approx(768**-0.5, rel=0.02)
    # The paper's saving: 24 M instead of 192 M at 250 000 pieces (facts: 250000 x 96 + 96 x 768).
    wide = TextTower(Shape(768, 1, 64, 12), 250_000, 4, 8, embedding_width=96)
    shapes = jax.eval_shape(wide.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.int32))["params"]
    count = shapes["Embed_0"]["embedding"].size + shapes["embedding_projection"]["kernel"].size
    assert count == 24_073_728


LONG = 12


@pytest.fixture(scope="module", params=["last", "first", "mean", "max", "map"])
def masked_embedder(request):
    tower = TextTower(SHAPE, 50, LONG, 12, pooling=request.param, eos_id=1)
    params = perturbed_params(tower)

    def embed(ids):
        cut = params | {"pos_embedding": params["pos_embedding"][:, : ids.shape[1]]}
        return tower.clone(max_length=ids.shape[1]).apply({"params": cut}, ids)

    return jax.jit(embed)


@settings(deadline=None)  # compiles two programs
@given(caption=st.lists(st.integers(2, 49), max_size=5), padding=st.integers(0, 49))
def test_masked_padding_does_not_change_the_embedding(masked_embedder, caption, padding):
    """Neither its length nor its ids matter."""
    ids = np.full((2, LONG), padding)
    ids[0, len(caption) + 1 :] = 1
    ids[:, : len(caption) + 1] = [*caption, 1]
    first, second = masked_embedder(ids)
    # Bitwise: a masked key has weight exp(-1e38) = 0 exactly, and all rows are computed alike.
    np.testing.assert_array_equal(first, second)
    short = masked_embedder(ids[:, :6])[0]
    np.testing.assert_allclose(short, first, atol=1e-5)  # other sizes, so other orders of the float32 sums


def row_keys(seed, n):
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(n))


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    x = jnp.full((50, 40, 10), 2.0)
    y = np.asarray(dropout(x, 0.3, row_keys(0, 50)))
    np.testing.assert_allclose(y[y != 0], 2 / 0.7, rtol=1e-6)
    # 20 000 draws: a standard deviation of 0.0032.
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.02)
    assert len(np.unique(y.reshape(50, -1), axis=0)) == 50  # rows have masks of their own
    assert dropout(x, 0.3, None) is x


@pytest.mark.parametrize("pooling", ["last", "map"])
def test_dropout_of_a_row_depends_on_its_key_alone(pooling):
    """A row has the same mask in any batch, so microbatches and devices do not change it."""
    tower = TextTower(SHAPE, 50, 6, 12, pooling=pooling, dropout=0.3)
    variables = {"params": perturbed_params(tower)}
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (8, 6)))
    embed = jax.jit(lambda ids, keys: tower.apply(variables, ids, dropout_keys=keys))
    whole = embed(ids, row_keys(0, 8))
    # Other sizes of the products, so other orders of the float32 sums.
    np.testing.assert_allclose(embed(ids[5:7], row_keys(0, 8)[5:7]), whole[5:7], atol=2e-5)
    assert np.abs(embed(ids, row_keys(1, 8)) - whole).max() > 0.1
    same = embed(jnp.tile(ids[:1], (8, 1)), row_keys(0, 8))
    assert len(np.unique(np.round(same, 3), axis=0)) == 8


def test_initialization_is_big_visions():
    tower = TextTower(VARIANTS["B"]._replace(depth=2), 2000, 16, 768)
    p = tower.init(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))["params"]
    # Standard deviations of at least 12 288 samples: a relative error of 1/sqrt(2n) < 0.7 %.
    assert np.std(p["Embed_0"]["embedding"]) == pytest.approx(768**-0.5, rel=0.02)
    assert np.std(p["pos_embedding"]) == pytest.approx(768**-0.5, rel=0.05)
    block = p["Encoder_0"]["encoderblock"]
    attention = block["MultiHeadDotProductAttention_0"]
    for name in ("query", "key", "value", "out"):
        kernel = np.abs(attention[name]["kernel"])
        assert 0.062 < kernel.max() <= 0.0625  # xavier uniform, heads flattened: sqrt(6 / (768 + 768))
        assert not attention[name]["bias"].any()
    limit = (6 / (768 + 3072)) ** 0.5 * (1 + 1e-6)  # rounded up in float32
    assert 0.99 * limit < np.abs(block["MlpBlock_0"]["Dense_0"]["kernel"]).max() <= limit
    assert np.std(block["MlpBlock_0"]["Dense_0"]["bias"]) == pytest.approx(1e-6, rel=0.1)
    assert np.std(p["head"]["kernel"]) == pytest.approx(768**-0.5, rel=0.02)
    assert not p["head"]["bias"].any()
    assert (block["LayerNorm_0"]["scale"] == 1).all()


def test_parameter_counts_equal_big_visions():
    def count(shape, out):
        tower = TextTower(shape, 32_000, 16, out)
        tree = jax.eval_shape(tower.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16), jnp.int32))
        return sum(a.size for a in jax.tree.leaves(tree))

    assert count(VARIANTS["B"], 768) == 110_234_880
    assert count(VARIANTS["L"]._replace(depth=12), 768) == 184_728_320
    assert count(VARIANTS["L"], 1408) == 336_539_008


def test_text_tower_without_head_requires_equal_widths():
    config = TextConfig(width=64, head=False)
    assert not make_text_tower(config, words(), 64).projected
    with pytest.raises(UserError, match=r"set text.width = 48 \(it is 64\), or text.head = true"):
        make_text_tower(config, words(), 48)
