"""tokenizer.json gives sentencepiece's ids, in the tokenizers library and in transformers."""

import io
import json
import unicodedata
from functools import cache

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_fast.data.dataset import open_dataset
from lit_fast.data.tokenizer import Tokenizer, load_tokenizer
from lit_fast.errors import UserError
from lit_fast.train.export.hf_tokenizer import check_tokenizer, tokenizer_json, write_tokenizer
from tests.torch_packages import import_package
from tests.trained import command

SENTENCES = [
    "a red thing, and a green one",
    "blue things; NOT green",
    "«Grüße» aus Köln",
    "1½ cups",
    "日本語の文",
] * 20
MODELS = {
    "unigram": {},
    "unigram without bytes": {"byte_fallback": False},
    "bpe": {"model_type": "bpe"},
    "bpe as it is": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<n>", "<nn>"],
        "split_by_whitespace": False,
    },
    "unigram with symbols": {"user_defined_symbols": ["<n>", "<nn>"], "normalization_rule_name": "nfkc"},
    "no space before": {"add_dummy_prefix": False, "split_by_unicode_script": False},
}
ODD = [
    "", " ", "  a  red ", "\n a\r\nb\t", "▁a ▁", "▁", "</s>", "<unk> </s> <pad> <s>", "a<0x41>b", "<0x41><0x0A>",
    "<n> A<N>b<nn>", "Ａ½ﬁ", "ÀÉ", "\u200b", "a\u3000b", "\x00\x01", "🙂👍🏽", "<" * 9,
]  # fmt: skip


@cache
def trained(kind):
    model = io.BytesIO()
    options = {"model_type": "unigram", "byte_fallback": True, "vocab_size": 340} | MODELS[kind]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return Tokenizer(model.getvalue(), 64)


def ids_of(tokenizer, texts):
    """By the tokenizers library, cut to the tokenizer's length."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = _backend(tokenizers, tokenizer)
    return [encoding.ids for encoding in backend.encode_batch(texts)]


@cache
def _backend(tokenizers, tokenizer):
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    backend.encode_special_tokens = True  # "split_special_tokens" of tokenizer_config.json
    backend.enable_truncation(tokenizer.max_length)
    return backend


def same(tokenizer, texts):
    check_tokenizer(tokenizer)
    for text, got, want in zip(texts, ids_of(tokenizer, texts), tokenizer.encode(texts)[0], strict=True):
        assert got == want, ascii(text)


# The library misreads marks and joiners behind a letter that the model's table rewrites: see the module.
MARKS = "".join(chr(i) for i in range(0x110000) if unicodedata.category(chr(i))[0] == "M") + "\u200c\u200d"
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Co", "M"], exclude_characters=MARKS), max_size=24)


@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=150)
@given(texts=st.lists(TEXTS | st.text("aAbdeghinorst ,.<>/nN▁ü½ﬁ日", max_size=40), max_size=8))
def test_ids_equal_sentencepiece_for_random_texts(kind, texts):
    same(trained(kind), texts)


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=24), max_size=8))
def test_ids_without_normalization_equal_sentencepiece_for_any_text(texts):
    same(trained("bpe as it is"), texts)


@pytest.mark.parametrize("kind", MODELS)
def test_ids_equal_sentencepiece_for_odd_texts(kind):
    same(trained(kind), ODD)


@pytest.mark.parametrize("file", ["c4_bpe_32k.model", "unigram_1k.model", "own"])
def test_ids_equal_sentencepiece_for_real_captions(file, realdata, tmp_path):
    data = tmp_path / "d"
    command("index", realdata / "flickr8k/dev/00000.tar", "--out", data)
    captions = [c for block in open_dataset(data).iter_captions() for row in block for c in row]
    path = realdata / "sentencepiece" / file
    if file == "own":
        command("tokenize", data, "--train-vocab", 2000, "--name", "own")
        path = data / "tokens/own/tokenizer.model"
    assert len(captions) > 4000
    same(load_tokenizer(path, 16), captions + ODD)


@pytest.mark.parametrize("masked", [False, True])
def test_written_tokenizer_loads_in_transformers(masked, tmp_path):
    transformers = import_package("transformers")
    ours = Tokenizer(trained("unigram").model, 8, padding=0)
    write_tokenizer(ours, str(tmp_path), masked=masked)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a red thing", "", "</s> a </s>", "blue things and green things and red things"]
    got = theirs(texts, padding="max_length", truncation=True, return_tensors="np")
    assert ("attention_mask" in got) == masked
    want = Tokenizer(ours.model, 8)(texts) if masked else ours(texts)
    np.testing.assert_array_equal(got["input_ids"], want)
    assert (theirs.model_max_length, theirs.eos_token_id) == (8, 1)
    assert theirs.pad_token_id == (1 if masked else 0)
    assert theirs.decode(ours.encode(["a red Thing"])[0][0], skip_special_tokens=True) == "a red thing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "char"}, "is neither unigram nor BPE"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces at the end of a word"),
        ({"user_defined_symbols": ["a b"]}, "has user-defined pieces with spaces"),
        ({"user_defined_symbols": [f"<{i}>" for i in range(1001)], "vocab_size": 1400}, "1001 user-defined"),
    ],
)
def test_check_tokenizer_unsupported_model_raises(options, message, monkeypatch):
    monkeypatch.setitem(MODELS, str(options), options)
    with pytest.raises(UserError, match=message) as error:
        check_tokenizer(trained(str(options)))
    assert "\n" not in str(error.value)
