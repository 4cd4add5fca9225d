"""A tokenizer as `tokenizer.json` of Hugging Face's tokenizers library: the same ids without sentencepiece.

The file is plain JSON; its fields are those of the library's serialisation. What sentencepiece does in one
step is said in three: a normaliser (lower-casing, Unicode, white space), the model (unigram or BPE with its
pieces), and a template that appends end-of-sentence, which truncation leaves in its place.

Ids are equal for every text that holds no lone surrogate and, where the model normalises Unicode, no
unusual sequence of combining marks, on which the library's reading of sentencepiece's table differs. A unigram
model may cut a run such as "......." elsewhere: between cuts of the same score the rounding of sums decides,
which sentencepiece does in float32 and the library in float64.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from lit_fast.data.tokenizer import Tokenizer
from lit_fast.errors import UserError
from lit_fast.storage.files import write_json

_SPACE = "\u2581"
# Types of pieces and models in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _USER_DEFINED, _BYTE = 1, 2, 4, 6
_UNIGRAM, _BPE = 1, 2
# User-defined pieces stand for themselves wherever they occur. In the model each is one character of the last
# private-use plane, which the normaliser puts in the place of the piece.
_LAST_PRIVATE = 0x10FFFD
_MOST_USER_DEFINED = 1000


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises UserError where `tokenizer.json` cannot give the same ids; the message says why."""
    proto = _proto(tokenizer)
    own = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
    trained, normal = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "is neither unigram nor BPE": trained.model_type not in (_UNIGRAM, _BPE),
        "marks spaces at the end of a word": trained.treat_whitespace_as_suffix,
        "does not escape spaces": not normal.escape_whitespaces,
        f"has {len(own)} user-defined pieces": len(own) > _MOST_USER_DEFINED,
        "has user-defined pieces with spaces": any(_SPACE in p or " " in p for p in own),
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(
                f"the tokenizer's sentencepiece model {reason}, which tokenizer.json cannot express; export with "
                f"--format lit_fast or onnx"
            )


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, masked: bool) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, with which `AutoTokenizer` loads.

    Args:
      tokenizer: what `check_tokenizer` has let pass.
      folder: where to.
      masked: the text tower does not see its padding: the attention mask is a part of the tokenizer's output,
        and end-of-sentence pads. Otherwise padding is ordinary tokens, and there is no mask.
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
        "split_special_tokens": True,  # in a caption they are text
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer.json", backend)
    write_json(folder / "tokenizer_config.json", config)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    proto = _proto(tokenizer)
    unigram = proto.trainer_spec.model_type == _UNIGRAM
    own = [p.piece for p in proto.pieces if p.type == _USER_DEFINED]
    private = {piece: chr(_LAST_PRIVATE - i) for i, piece in enumerate(own)}
    names = [_name(p, private) for p in proto.pieces]
    end = names[tokenizer.eos_id]
    special = sorted({tokenizer.eos_id, tokenizer.pad_id})
    template = lambda name: {"Sequence": {"id": name, "type_id": 0}}  # noqa: E731
    appended = {"SpecialToken": {"id": end, "type_id": 0}}
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
            for i in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec, private)},
        "pre_tokenizer": _literal_bytes() if unigram and proto.trainer_spec.byte_fallback else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [template("A"), appended],
            "pair": [template("A"), appended, template("B"), appended],
            "special_tokens": {end: {"id": end, "ids": [tokenizer.eos_id], "tokens": [end]}},
        },
        "decoder": _decoder(private),
        "model": _unigram(proto, names) if unigram else _bpe(proto, names),
    }


def _proto(tokenizer: Tokenizer) -> Any:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    return ModelProto.FromString(tokenizer.model)


def _name(piece: Any, private: dict[str, str]) -> str:
    """A piece's name in the file. What no text may yield is told from text by a space, which there is none of."""
    if piece.type in (_NORMAL, _BYTE):
        return str(piece.piece)
    return private.get(piece.piece, f" {piece.piece}")


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _replace_all(regex: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


def _normalizers(spec: Any, private: dict[str, str]) -> list[dict[str, Any]]:
    """ASCII lower-casing, then sentencepiece's steps (normalizer.cc) in their order."""
    capitals = [chr(i) for i in range(ord("A"), ord("Z") + 1)]
    steps = [_replace(letter, letter.lower()) for letter in capitals]
    steps += [_replace(piece, private[piece]) for piece in sorted(private, key=len, reverse=True)]
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        steps += [_replace_all(r"\A +", ""), _replace_all(" {2,}", " ")]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append(_replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(_replace_all(rf"{_SPACE}+\z", ""))
    return steps


def _literal_bytes() -> dict[str, Any]:
    """Keeps the text "<0x41>" from being read as the piece of that name: what the piece would span is cut."""
    return {
        "type": "Split",
        "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def _unigram(proto: Any, names: list[str]) -> dict[str, Any]:
    unknown = next(i for i, p in enumerate(proto.pieces) if p.type == _UNKNOWN)
    lowest = min(p.score for p in proto.pieces if p.type == _NORMAL)
    # An unknown character costs 10 more than the cheapest piece; no other score may be lower.
    scores = [p.score if p.type == _NORMAL else max(0.0, lowest) for p in proto.pieces]
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [list(pair) for pair in zip(names, scores, strict=True)],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any, names: list[str]) -> dict[str, Any]:
    """Two neighbours are merged if the whole is a piece, the best whole first: the pairs in that order."""
    scores = {p.piece: p.score for p in proto.pieces if p.type == _NORMAL}
    pairs = [
        (-score, piece, cut)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
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
        "merges": [[piece[:cut], piece[cut:]] for _, piece, cut in sorted(pairs)],
    }


def _decoder(private: dict[str, str]) -> dict[str, Any]:
    steps = [_replace(character, piece) for piece, character in private.items()]
    steps += [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
