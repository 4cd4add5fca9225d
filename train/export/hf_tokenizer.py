"""Write a sentencepiece tokenizer as Hugging Face's `tokenizer.json`.

The tokenizers library gives the same ids from it. The file expresses sentencepiece's one step as
three: a normalizer (lower-casing, Unicode, white space), the model (unigram or BPE with its pieces), and a template
that appends end-of-sentence, which truncation keeps.

Ids are equal for every text that holds no lone surrogate and, if the model normalizes Unicode, no unusual sequence of
combining marks, for which the library reads sentencepiece's table differently. A unigram model may split a run such
as "......." elsewhere: between splits of the same score the rounding of sums decides, in float32 for sentencepiece and
in float64 for the library.
"""

from __future__ import annotations

import base64
import string
from typing import Any

from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.storage.paths import join
from lit_fast.storage.text_files import write_json

_SPACE = "\u2581"
# Types of pieces and models in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6
_UNIGRAM, _BPE = 1, 2
# User-defined pieces are never split. The normalizer replaces each by one character of the last private-use plane.
_LAST_PRIVATE = 0x10FFFD
_MAX_USER_DEFINED = 1000


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise UserError, with the reason, if `tokenizer.json` cannot give the same ids."""
    proto = _proto(tokenizer)
    user_defined = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "is neither unigram nor BPE": trainer.model_type not in (_UNIGRAM, _BPE),
        "marks spaces at the end of a word": trainer.treat_whitespace_as_suffix,
        "does not escape spaces": not normalizer.escape_whitespaces,
        f"has {len(user_defined)} user-defined pieces": len(user_defined) > _MAX_USER_DEFINED,
        "has user-defined pieces with spaces": any(_SPACE in p or " " in p for p in user_defined),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(
                f"the tokenizer's sentencepiece model {reason}, which tokenizer.json cannot express; export with "
                f"--format lit_fast or onnx"
            )


def write_tokenizer(tokenizer: Tokenizer, directory: str, *, masked: bool) -> None:
    """Write the two files that `AutoTokenizer` loads.

    Args:
      tokenizer: one that passes `check_tokenizer`.
      directory: existing.
      masked: the text tower masks padding: the tokenizer returns an attention mask and pads with end-of-sentence.
        Otherwise padding is ordinary tokens, and there is no mask.
    """
    backend = tokenizer_json(tokenizer)
    names = {token["id"]: token["content"] for token in backend["added_tokens"]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.max_length,
        "eos_token": names[tokenizer.eos_id],
        "pad_token": names[tokenizer.eos_id if masked else tokenizer.pad_id],
        "padding_side": "right",
        "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"] if masked else ["input_ids"],
        "split_special_tokens": True,  # in captions they are ordinary text
        "clean_up_tokenization_spaces": False,
    }
    write_json(join(directory, "tokenizer.json"), backend)
    write_json(join(directory, "tokenizer_config.json"), config)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `tokenizer.json`."""
    proto = _proto(tokenizer)
    unigram = proto.trainer_spec.model_type == _UNIGRAM
    user_defined = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
    private = {piece: chr(_LAST_PRIVATE - i) for i, piece in enumerate(user_defined)}
    names = [_name(p, private) for p in proto.pieces]
    eos = names[tokenizer.eos_id]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    # Split the text "<0x41>" after its first character: it must not become the byte piece of that name.
    split_byte_names = {
        "type": "Split",
        "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": names[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in sorted({tokenizer.eos_id, tokenizer.pad_id})
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec, private)},
        "pre_tokenizer": split_byte_names if unigram and proto.trainer_spec.byte_fallback else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {eos: {"id": eos, "ids": [tokenizer.eos_id], "tokens": [eos]}},
        },
        "decoder": _decoder(private),
        "model": _unigram(proto, names) if unigram else _bpe(proto, names),
    }


def _proto(tokenizer: Tokenizer) -> Any:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    return ModelProto.FromString(tokenizer.model)


def _name(piece: Any, private: dict[str, str]) -> str:
    """Return a piece's name in the file.

    Control tokens get a leading space, so that no text becomes one.
    """
    if piece.type in (_NORMAL, _BYTE):
        return str(piece.piece)
    return private.get(piece.piece, f" {piece.piece}")


def _replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _normalizers(spec: Any, private: dict[str, str]) -> list[dict[str, Any]]:
    """Return ASCII lower-casing, then the steps of sentencepiece's normalizer.cc."""
    steps = [_replace(letter, letter.lower()) for letter in string.ascii_uppercase]
    steps += [_replace(piece, private[piece]) for piece in sorted(private, key=len, reverse=True)]
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        steps += [_replace(r"\A +", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append(_replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(_replace(rf"{_SPACE}+\z", "", "Regex"))
    return steps


def _unigram(proto: Any, names: list[str]) -> dict[str, Any]:
    unknown = next(i for i, p in enumerate(proto.pieces) if p.type == _UNKNOWN)
    lowest = min(p.score for p in proto.pieces if p.type == _NORMAL)
    # An unknown character scores 10 less than the lowest piece; no other score may be lower.
    scores = [p.score if p.type == _NORMAL else max(0.0, lowest) for p in proto.pieces]
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [list(pair) for pair in zip(names, scores, strict=True)],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any, names: list[str]) -> dict[str, Any]:
    """Return a BPE model.

    Its merges are all pairs of pieces that form a piece, the highest score first.
    """
    scores = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    pairs = [
        (-score, piece, i)
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(n for n, p in zip(names, proto.pieces, strict=True) if p.type == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": [[piece[:i], piece[i:]] for _, piece, i in sorted(pairs)],
    }


def _decoder(private: dict[str, str]) -> dict[str, Any]:
    steps = [_replace(character, piece) for piece, character in private.items()]
    steps += [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
