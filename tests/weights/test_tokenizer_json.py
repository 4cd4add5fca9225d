"""Sentencepiece models from `tokenizer.json`: round trips, the tokenizers library, and files that are refused."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from lit_fast.cli.main import main
from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.storage.text_files import read_json
from lit_fast.train.export.hf_tokenizer import tokenizer_json
from lit_fast.weights.tokenizer_json import sentencepiece_model
from tests.helpers import samples, write_tar
from tests.web import Hub, own_cache, running_hub  # noqa: F401

WORDS = [
    "a",
    "an",
    "the",
    "cat",
    "dog",
    "photo",
    "of",
    "two",
    "red",
    "green",
    "running",
    "grass",
    "Zürich",
    "café",
    "猫",
    "<0x41>",
    "aaaa",
    ",",
    ".",
    "!",
    "▁",
    "x",
]


def texts(seed: int = 0, count: int = 300) -> list[str]:
    rng = np.random.default_rng(seed)
    return [(" " * rng.integers(1, 4)).join(rng.choice(WORDS, rng.integers(0, 12))) for _ in range(count)]


@cache
def trained(model_type: str, byte_fallback: bool = True, **options: object) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(1, 2000)), model_writer=model, vocab_size=330 if byte_fallback else 70,
        model_type=model_type, byte_fallback=byte_fallback, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return Tokenizer(model.getvalue(), 64)


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_sentencepiece_model_of_an_exported_tokenizer_gives_the_same_ids(
    model_type: str, byte_fallback: bool, rule: str
) -> None:
    tokenizer = trained(model_type, byte_fallback, normalization_rule_name=rule)
    converted = sentencepiece_model(json.dumps(tokenizer_json(tokenizer)).encode(), "t")
    again = Tokenizer(converted, 64)
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert again.encode(texts(2)) == tokenizer.encode(texts(2))
    np.testing.assert_array_equal(again.text_ids(), tokenizer.text_ids())


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_sentencepiece_model_gives_the_ids_of_the_library(model_type: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = json.dumps(tokenizer_json(trained(model_type)))
    library, converted = (
        tokenizers.Tokenizer.from_str(text),
        Tokenizer(sentencepiece_model(text.encode(), "t"), 64),
    )
    assert [library.encode(t).ids for t in texts(3)] == converted.encode(texts(3))[0]


def with_metaspace(tokenizer: Tokenizer) -> dict:
    """The content of a `tokenizer.json` in the form of T5."""
    document = tokenizer_json(tokenizer)
    charsmap = [step for step in document["normalizer"]["normalizers"] if step["type"] == "Precompiled"]
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    collapse = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    normalizer = {"type": "Sequence", "normalizers": [*charsmap, strip, collapse]}
    return document | {"normalizer": normalizer, "pre_tokenizer": metaspace}


def test_sentencepiece_model_of_a_file_of_t5_gives_the_ids_of_the_library() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    document = with_metaspace(trained("unigram"))
    library = tokenizers.Tokenizer.from_str(json.dumps(document))
    converted = Tokenizer(sentencepiece_model(json.dumps(document).encode(), "t"), 64)
    spaced = [f"{' ' * (i % 3)}{text}{' ' * (i % 2)}" for i, text in enumerate(texts(4)) if text.strip()]
    spaced = [text.lower() for text in spaced if "<0x41>" not in text]  # it would become a byte piece
    assert [library.encode(text).ids for text in spaced] == converted.encode(spaced)[0]


def test_sentencepiece_model_refuses_spaces_that_are_not_stripped() -> None:
    document = with_metaspace(trained("unigram"))
    del document["normalizer"]["normalizers"][-2]
    with pytest.raises(UserError, match="treats spaces differently, which sentencepiece cannot express"):
        sentencepiece_model(json.dumps(document).encode(), "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"type": "WordPiece"}},
            "has a model of type WordPiece, which sentencepiece cannot express",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "has the normalizer Lowercase"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}},
            "replaces 'a' by 'b'",
        ),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "has the pre-tokenizer ByteLevel"),
        (
            {"added_tokens": [{"id": 5, "content": "<x>", "special": False}]},
            "has 1 user-defined tokens like '<x>'",
        ),
        ({"post_processor": None, "added_tokens": []}, "has no end-of-sentence token"),
        ({"model": {}}, "is damaged"),
        ({"added_tokens": [7]}, "is damaged"),
    ],
)
def test_sentencepiece_model_refuses_other_files_in_one_line(change: dict, message: str) -> None:
    document = tokenizer_json(trained("unigram")) | change
    with pytest.raises(UserError, match=message) as caught:
        sentencepiece_model(json.dumps(document).encode(), "t")
    assert "\n" not in str(caught.value)


def test_sentencepiece_model_refuses_merges_in_another_order() -> None:
    document = tokenizer_json(trained("bpe"))
    document["model"]["merges"].reverse()
    with pytest.raises(UserError, match="has merges in an order that scores of pieces do not give"):
        sentencepiece_model(json.dumps(document).encode(), "t")


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_tokenize_takes_the_tokenizer_of_a_repository(hub: Hub, tmp_path: Path, file: str) -> None:
    write_tar(tmp_path / "a.tar", samples(12))
    assert main(["index", str(tmp_path / "a.tar"), "--out", str(tmp_path / "d")]) == 0
    tokenizer = trained("unigram")
    content = tokenizer.model if file == "tokenizer.model" else json.dumps(tokenizer_json(tokenizer)).encode()
    hub.add("owner/siglip-base", {file: content})
    assert main(["tokenize", str(tmp_path / "d"), "--tokenizer", "hf:owner/siglip-base"]) == 0
    tokens = read_json(tmp_path / "d" / "tokens" / "siglip-base" / "tokens.json")
    assert (tokens["vocab_size"], tokens["eos_id"]) == (tokenizer.vocab_size, tokenizer.eos_id)
