"""The text tower against a float64 reference, its initialisation and its tokens."""

import string
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.config import TextConfig
from lit_fast.data.tokenizer import Tokenizer, load_tokenizer, lower
from lit_fast.data.tokens import decode_record, encode_record, open_tokens
from lit_fast.errors import UserError
from lit_fast.models.sizes import VARIANTS, Shape
from lit_fast.models.text_tower import TextTower
from lit_fast.models.two_towers import text_tower as text_tower_of
from tests.reference import text_tower
from tests.synthetic import make_dataset
from tests.torch_packages import import_package

SHAPE = Shape(width=32, depth=3, mlp_dim=64, heads=4)


def shaken(tower, seed=0):
    """Parameters in which every one matters, biases and norms too."""
    rng = np.random.default_rng(seed)
    ids = jnp.zeros((1, tower.max_length), jnp.int32)
    params = jax.jit(tower.init)(jax.random.key(seed), ids)["params"]
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pooling", ["last", "first", "mean", "max", "map"])
def test_equals_the_float64_reference(pooling, masked):
    tower = TextTower(SHAPE, 50, 6, 12, pooling=pooling, eos_id=1 if masked else None)
    ids = np.random.default_rng(0).integers(2, 50, (4, 6))
    ids[1, 3:] = ids[2, 1:] = ids[3, :] = 1  # end of sentence and padding, down to an empty caption
    ids[0, 5] = 1
    params = shaken(tower)
    assert ("MAPHead_0" in params) == (pooling == "map")
    seen = np.arange(6) <= np.array([5, 3, 1, 0])[:, None] if masked else None
    got = jax.jit(tower.apply)({"params": params}, ids)
    want = text_tower(ids, jax.tree.map(np.float64, params), pooling, seen)
    np.testing.assert_allclose(got, want, atol=3e-5)  # outputs of about 1, three float32 layers


@pytest.mark.parametrize("options", [{"embedding_width": 8}, {"projected": False}])
def test_narrow_table_and_no_head_equal_the_reference(options):
    tower = TextTower(SHAPE, 50, 6, 32, **options)
    params = shaken(tower)
    ids = np.random.default_rng(0).integers(0, 50, (4, 6))
    want = text_tower(ids, jax.tree.map(np.float64, params), "last")
    np.testing.assert_allclose(jax.jit(tower.apply)({"params": params}, ids), want, atol=3e-5)


def test_narrow_table_starts_at_the_scale_of_the_plain_one():
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
    params = shaken(tower)

    def embed(ids):
        cut = params | {"pos_embedding": params["pos_embedding"][:, : ids.shape[1]]}
        return tower.clone(max_length=ids.shape[1]).apply({"params": cut}, ids)

    return jax.jit(embed)


@settings(deadline=None)  # two programs are compiled
@given(caption=st.lists(st.integers(2, 49), max_size=5), padding=st.integers(0, 49))
def test_hidden_padding_leaves_no_trace(masked_embedder, caption, padding):
    """Neither its length nor what it consists of changes the embedding."""
    ids = np.full((2, LONG), padding)
    ids[0, len(caption) + 1 :] = 1
    ids[:, : len(caption) + 1] = [*caption, 1]
    first, second = masked_embedder(ids)
    # The same numbers: a hidden key has weight exp(-1e38) = 0 exactly, and a row is computed like any other.
    np.testing.assert_array_equal(first, second)
    short = masked_embedder(ids[:, :6])[0]
    np.testing.assert_allclose(short, first, atol=1e-5)  # other sizes, so other orders of the float32 sums


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
    limit = (6 / (768 + 3072)) ** 0.5 * (1 + 1e-6)  # rounded up in float32
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


def test_a_head_is_left_out_only_where_the_widths_agree(tokenizer):
    config = TextConfig(width=64, head=False)
    assert not text_tower_of(config, tokenizer, 64).projected
    with pytest.raises(UserError, match=r"set text.width = 48 \(it is 64\), or text.head = true"):
        text_tower_of(config, tokenizer, 48)


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


def test_padding_of_another_id(tokenizer):
    """As SigLIP 2 does; the end of sentence stays what it is."""
    other = Tokenizer(tokenizer.model, 6, 0)
    ids = other(["", "a"])
    end = list(ids[1]).index(1)
    np.testing.assert_array_equal(ids[0], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(ids[1, end:], [1] + [0] * (5 - end))
    assert other.identity != Tokenizer(tokenizer.model, 6).identity
    # Naming the default changes nothing, so that token stores keep their identity.
    assert Tokenizer(tokenizer.model, 6, 1).identity == Tokenizer(tokenizer.model, 6).identity
    with pytest.raises(UserError, match="padding id 1000 is not one of"):
        Tokenizer(tokenizer.model, 6, 1000)


def test_stored_tokens_are_padded_with_the_id_that_the_command_names(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "d", 20)
    command = ["tokenize", str(tmp_path / "d"), "--name", "zero", "--max-length", "40", "--pad-id", "0"]
    assert main([*command, "--tokenizer", str(tmp_path / "d/tokens/words/tokenizer.model")]) == 0
    tokens = open_tokens(dataset, "zero")
    captions = [c for block in dataset.iter_captions() for row in block for c in row]
    _, ids = tokens.decode(tokens.reader().read(0))
    np.testing.assert_array_equal(ids, tokens.tokenizer()(captions))
    assert (ids == 0).any()
    assert main([*command, "--tokenizer", str(tmp_path / "d/tokens/zero/tokenizer.model")]) == 0
    assert "is complete" in capsys.readouterr().out


def test_tokens_of_transformers_differ_by_punctuation_alone(realdata):
    """SigLIP was trained on big_vision's tokens; transformers' tokenizer deletes punctuation before."""
    transformers = import_package("transformers")
    path = realdata / "sentencepiece" / "c4_bpe_32k.model"
    theirs = transformers.SiglipTokenizer(str(path))
    with tarfile.open(next((realdata / "flickr8k" / "dev").glob("*.tar"))) as tar:
        names = [n for n in tar.getnames() if n.endswith(".txt")][:300]
        captions = [tar.extractfile(n).read().decode().strip() for n in names]
    assert any("," in c for c in captions)
    plain = [" ".join(c.translate(str.maketrans("", "", string.punctuation)).split()) for c in captions]
    want = theirs(captions, padding="max_length", truncation=True, max_length=64)["input_ids"]
    np.testing.assert_array_equal(load_tokenizer(path, 64)(plain), want)


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
