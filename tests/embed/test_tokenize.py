"""A vocabulary that is trained on the captions of a dataset."""

import json

import pytest
from PIL import Image

from lit_fast.cli.main import main
from lit_fast.embed.index import index_dataset
from lit_fast.embed.tokenize import tokenize_dataset
from lit_fast.errors import UserError


def make(path, captions):
    Image.new("RGB", (8, 8)).save(path / "a.png")
    rows = [{"key": str(i), "image": "a.png", "caption": caption} for i, caption in enumerate(captions)]
    (path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    index_dataset([str(path / "t.jsonl")], path / "d")
    return path / "d"


@pytest.mark.parametrize(
    "captions",
    [
        ["word end " * 1000],  # above 4192 bytes
        ["語" * 5000],  # a word above 4192 bytes
        ["a \u2585 b", "c\u2585"],  # reserved by sentencepiece
    ],
    ids=["long", "long word", "reserved"],
)
def test_training_a_vocabulary_uses_every_caption(tmp_path, captions, capsys):
    number = 259 + len({c for c in "".join(captions) if c not in " \u2585"}) + 1
    tokenize_dataset(make(tmp_path, captions), train_vocab=number)
    assert f"trained {number} pieces on all {len(captions)} captions" in capsys.readouterr().out


def test_training_a_vocabulary_counts_captions_without_text(tmp_path, capsys):
    tokenize_dataset(make(tmp_path, ["a b", "\u2585"]), train_vocab=262)
    assert "trained 262 pieces on 1 of 2 captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("captions", "number", "problem"),
    [
        (["\u2585"], 300, "no caption of .* has text"),
        (["a b"], 5, r"trained on the 1 captions of .*; give --train-vocab 262 or more"),
        (["a b"], 300, r"too few different words; give --train-vocab 26\d or less"),
        (["a b"], 2**31 - 1, "--train-vocab 2147483647 is too high; give 1000000 or less"),
    ],
)
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_vocabulary_that_cannot_be_trained_is_a_line_with_a_number(
    tmp_path, captions, number, problem, model_type
):
    with pytest.raises(UserError, match=problem) as raised:
        tokenize_dataset(make(tmp_path, captions), train_vocab=number, model_type=model_type)
    assert "INTERNAL" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tokenize_needs_no_device(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "gpuu")
    assert main(["tokenize", str(make(tmp_path, ["a b"])), "--train-vocab", "262"]) == 0
