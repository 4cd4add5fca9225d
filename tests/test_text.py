"""The text tower against a float64 reference, its initialisation and its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.errors import UserError
from lit_fast.text import TextTower
from lit_fast.tokens import Tokenizer, decode_record, encode_record, load_tokenizer, lower
from lit_fast.variants import VARIANTS, Shape
from tests.reference import encoder

SHAPE = Shape(width=32, depth=3, mlp_dim=64, heads=4)


def reference(params, ids, pooling, seen):
    p = jax.tree.map(np.float64, params)
    x = p["Embed_0"]["embedding"][ids] + p["pos_embedding"]
    x = encoder(x, p["Encoder_0"], "tanh", seen)
    if pooling == "last":
        x = x[:, -1]
    else:
        weight = np.ones(ids.shape) if seen is None else seen.astype(float)
        x = (x * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
    return x @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize(("pooling", "masked"), [("last", False), ("mean", False), ("mean", True)])
def test_equals_the_float64_reference(pooling, masked):
    tower = TextTower(SHAPE, 50, 6, 12, pooling=pooling, pad_id=1 if masked else None)
    ids = np.random.default_rng(0).integers(2, 50, (4, 6))
    ids[1, 3:] = ids[2, 1:] = ids[3, :] = 1  # end of sentence and padding, down to an empty caption
    ids[0, 5] = 1
    params = tower.init(jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda a: a + 0.1 * np.random.default_rng(1).normal(size=a.shape), params)
    seen = None
    if masked:
        first_end = [5, 3, 1, 0]
        seen = np.arange(6) <= np.array(first_end)[:, None]
    got = jax.jit(tower.apply)({"params": params}, ids)
    want = reference(params, ids, pooling, seen)
    np.testing.assert_allclose(got, want, atol=3e-5)  # outputs of about 1, three float32 layers


def test_initialisation_is_big_visions():
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
    limit = (6 / (768 + 3072)) ** 0.5
    assert 0.99 * limit < np.abs(block["MlpBlock_0"]["Dense_0"]["kernel"]).max() <= limit
    assert np.std(block["MlpBlock_0"]["Dense_0"]["bias"]) == pytest.approx(1e-6, rel=0.1)
    assert np.std(p["head"]["kernel"]) == pytest.approx(768**-0.5, rel=0.02)
    assert not p["head"]["bias"].any()
    assert (block["LayerNorm_0"]["scale"] == 1).all()


def test_parameter_counts_of_the_facts():
    def count(shape, out):
        tower = TextTower(shape, 32_000, 16, out)
        tree = jax.eval_shape(tower.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16), jnp.int32))
        return sum(a.size for a in jax.tree.leaves(tree))

    assert count(VARIANTS["B"], 768) == 110_234_880
    assert count(VARIANTS["L"]._replace(depth=12), 768) == 184_728_320
    assert count(VARIANTS["L"], 1408) == 336_539_008


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import sentencepiece

    prefix = tmp_path_factory.mktemp("spm") / "m"
    texts = ["a small red cat", "the big dog runs", "two birds in a tree", "a dog and a cat"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(prefix), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return load_tokenizer(prefix.with_suffix(".model"), 4)


def test_sticky_end_of_sentence(tokenizer):
    ids = tokenizer(["", "a", "the big dog runs in a tree", "A"])
    assert ids.dtype == np.int32
    assert ids.shape == (4, 4)
    np.testing.assert_array_equal(ids[0], [1, 1, 1, 1])
    assert ids[1, 0] != 1
    np.testing.assert_array_equal(ids[1, 1:], 1)
    assert ids[2, 3] == 1  # survives truncation
    assert (ids[2, :3] != 1).all()
    np.testing.assert_array_equal(ids[3], ids[1])  # lower-cased


def test_only_ascii_is_lower_cased():
    assert lower("A CAT, ÉTÉ, ÄÖ, İ") == "a cat, ÉtÉ, ÄÖ, İ"


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"\x00garbage")
    with pytest.raises(UserError, match=r"x\.model"):
        load_tokenizer(tmp_path / "x.model", 16)
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "none.model", 16)
    with pytest.raises(UserError, match=r"no end-of-sentence|not a sentencepiece"):
        Tokenizer(b"", 16)


@given(
    st.lists(st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=5), max_size=3), max_size=8),
    st.sampled_from([300, 65_536, 70_000]),
)
def test_records_round_trip(rows, vocab):
    rows = [[[i % vocab for i in ids] for ids in row] for row in rows]
    counts, ids = decode_record(encode_record(rows, vocab), vocab, 5, 7)
    assert counts.tolist() == [len(row) for row in rows]
    flat = [ids + [7] * (5 - len(ids)) for row in rows for ids in row]
    assert ids.tolist() == flat
