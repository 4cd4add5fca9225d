"""Tokenizers, and the records of stored token ids."""

import string
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.data.tokenizer import Tokenizer, load_tokenizer, lower
from lit_fast.data.tokens import decode_record, encode_record, open_tokens
from lit_fast.errors import UserError
from tests.synthetic import make_dataset
from tests.torch_packages import import_package


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


def test_tokenizer_keeps_the_end_of_sentence_when_truncating(tokenizer):
    ids = tokenizer(["", "a", "the big dog runs in a tree", "A"])
    assert ids.dtype == np.int32
    assert ids.shape == (4, 4)
    np.testing.assert_array_equal(ids[0], [1, 1, 1, 1])
    assert ids[1, 0] != 1
    np.testing.assert_array_equal(ids[1, 1:], 1)
    assert ids[2, 3] == 1  # survives truncation
    assert (ids[2, :3] != 1).all()
    np.testing.assert_array_equal(ids[3], ids[1])  # lower-cased


def test_tokenizer_pads_with_another_id(tokenizer):
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


def test_tokenize_command_pads_with_the_id_of_its_flag(tmp_path, capsys):
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


def test_lower_changes_ascii_only():
    assert lower("A CAT, ÉTÉ, ÄÖ, İ") == "a cat, ÉtÉ, ÄÖ, İ"


def test_tokenizer_refuses_files_that_are_no_model(tmp_path):
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
