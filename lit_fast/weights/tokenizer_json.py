"""Convert `tokenizer.json` of Hugging Face's tokenizers library to a sentencepiece model that gives the same ids.

Sentencepiece does in one step what the library does in three: a normalizer, a pre-tokenizer and the model. A file is
converted if its steps are those of sentencepiece; any other step is refused, as it would change ids. The text
"<0x41>", the name of a byte piece, is text to sentencepiece, while the library may take it for the byte.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

from lit_fast.errors import UserError

_SPACE = "\u2581"
# Types of models and pieces in sentencepiece_model.proto.
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
# Replacements of white space, and their effects.
_REPLACEMENTS = {
    (r"\A +", ""): {"strip left"},
    (rf"{_SPACE}+\z", ""): {"strip right"},
    (r"\A +| +\z", ""): {"strip left", "strip right"},
    (" {2,}", " "): {"collapse"},
    (" {2,}", _SPACE): {"collapse"},
    (" ", _SPACE): {"escape"},
    (rf"\A{_SPACE}", _SPACE * 2): {"double"},
}


class _InexpressibleError(Exception):
    """The file has a step or a property that sentencepiece does not have."""


def sentencepiece_model(data: bytes, path: str) -> bytes:
    """Return the serialized sentencepiece model of the content of a `tokenizer.json`.

    Args:
      data: the content.
      path: for messages.

    Raises:
      UserError: the file is damaged, or sentencepiece cannot express it.
    """
    try:
        return _convert(json.loads(data))
    except _InexpressibleError as error:
        raise UserError(
            f"{path} {error}, which sentencepiece cannot express; give a sentencepiece model (.model)"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}; download it again") from None


def _convert(document: dict[str, Any]) -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = document["model"]
    proto = ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if model["type"] not in ("Unigram", "BPE"):
        raise _InexpressibleError(f"has a model of type {model['type']}")
    trainer.model_type = _UNIGRAM if model["type"] == "Unigram" else _BPE
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    effects: set[str] = set()
    for step in _steps(document["normalizer"], "normalizers"):
        if step["type"] == "Precompiled":
            normalizer.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
        else:
            effects |= _normalizer_effects(step)
    for step in _steps(document["pre_tokenizer"], "pretokenizers"):
        effects |= _pre_tokenizer_effects(step)
    _check_effects(effects)
    normalizer.add_dummy_prefix = "prefix" in effects
    normalizer.remove_extra_whitespaces = "collapse" in effects

    added = {token["id"]: token for token in document["added_tokens"]}
    if user_defined := [token["content"] for token in added.values() if not token["special"]]:
        raise _InexpressibleError(f"has {len(user_defined)} user-defined tokens like {user_defined[0]!r}")
    if trainer.model_type == _UNIGRAM:
        names, scores = (
            [str(name) for name, _ in model["vocab"]],
            [float(score) for _, score in model["vocab"]],
        )
    else:
        names, scores = _bpe(model)
    if "split" in effects and any(_SPACE in name[1:] for name in names):
        raise _InexpressibleError("splits at spaces, but has pieces that contain spaces")
    for i in range(len(names), max(added, default=-1) + 1):  # special tokens beyond the model's vocabulary
        names.append(added[i]["content"])
        scores.append(0.0)
    unknown = model["unk_id"] if trainer.model_type == _UNIGRAM else names.index(model["unk_token"])
    for i, (name, score) in enumerate(zip(names, scores, strict=True)):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = name.removeprefix(" "), score, _NORMAL
        if i == unknown:
            piece.type, trainer.unk_piece = _UNKNOWN, piece.piece
        elif i in added or name.startswith(" "):  # no text has pieces with spaces
            piece.type = _CONTROL
        elif trainer.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", name):
            piece.type = _BYTE
    end = _end_of_sentence(document, added)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = unknown, -1, end, -1
    trainer.eos_piece = proto.pieces[end].piece
    return proto.SerializeToString()


def _steps(step: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a nested sequence of steps."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step[key]:
            yield from _steps(inner, key)
    else:
        yield step


def _normalizer_effects(step: dict[str, Any]) -> set[str]:
    """Return the effects of a normalizer on white space."""
    if step["type"] == "Prepend" and step["prepend"] == _SPACE:
        return {"prefix"}
    if step["type"] == "Strip":
        return {effect for effect in ("strip left", "strip right") if step[effect.replace(" ", "_")]}
    if step["type"] != "Replace":
        raise _InexpressibleError(f"has the normalizer {step['type']}")
    (pattern,) = step["pattern"].values()
    content = step["content"]
    if len(pattern) == 1 and pattern.isascii() and pattern.isupper() and content == pattern.lower():
        return set()  # lit_fast.data.tokenizer lower-cases ASCII letters as well
    if (pattern, content) not in _REPLACEMENTS:
        raise _InexpressibleError(f"replaces {pattern!r} by {content!r}")
    return _REPLACEMENTS[pattern, content]


def _pre_tokenizer_effects(step: dict[str, Any]) -> set[str]:
    """Return the effects of a pre-tokenizer on white space."""
    if step["type"] == "Metaspace" and step["replacement"] == _SPACE:
        prefix = {"prefix", "metaspace"} if step.get("prepend_scheme", "always") != "never" else set()
        return {"escape"} | prefix | ({"split"} if step.get("split", True) else set())
    if step["type"] == "Split" and step["pattern"] in (
        {"Regex": "<(?=0x[0-9A-F]{2}>)"},  # keeps the text "<0x41>" from becoming a byte piece
        {"String": " "},  # spaces are replaced before
    ):
        return set()
    raise _InexpressibleError(f"has the pre-tokenizer {step['type']}")


def _check_effects(effects: set[str]) -> None:
    """Check that white space at the ends of a text and between words is treated as sentencepiece treats it.

    Sentencepiece collapses spaces and strips both ends, or does neither, and then adds a prefix. Metaspace adds none
    before a space, which is equal to stripping the left end.
    """
    if "collapse" in effects:
        equal = "strip right" in effects and bool(effects & {"strip left", "metaspace"})
    else:
        equal = not effects & {"strip left", "strip right"} and (
            "metaspace" not in effects or "double" in effects
        )
    if not equal or "escape" not in effects:
        raise _InexpressibleError("treats spaces differently")


def _bpe(model: dict[str, Any]) -> tuple[list[str], list[float]]:
    """Return pieces and scores; the merges must be all pairs of pieces that form a piece, in order of its score."""
    if (
        model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or model.get("ignore_merges")
    ):
        raise _InexpressibleError("marks the ends of words or ignores merges")
    names = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][name] for name in names] != list(range(len(names))):
        raise ValueError("the ids of the vocabulary are not consecutive")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    special = {token for token in names if token.startswith(" ") or token == model["unk_token"]}
    pieces = set(names) - special
    pairs = [
        (rank, i, (piece[:i], piece[i:]))
        for piece, rank in ranks.items()
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]
    # A longer piece without a merge is one that sentencepiece would form.
    unmerged = any(
        name[:i] in pieces and name[i:] in pieces
        for name in pieces - ranks.keys()
        if not re.fullmatch("<0x[0-9A-F]{2}>", name)
        for i in range(1, len(name))
    )
    if unmerged or merges != [pair for _, _, pair in sorted(pairs)]:
        raise _InexpressibleError("has merges in an order that scores of pieces do not give")
    return names, [-float(ranks[name]) if name in ranks else -float(len(ranks)) for name in names]


def _end_of_sentence(document: dict[str, Any], added: dict[int, dict[str, Any]]) -> int:
    """Return the id of the token that the post-processor appends, else that of a special token with a usual name."""
    processor = document.get("post_processor") or {}
    if processor.get("type") == "TemplateProcessing" and "SpecialToken" in processor["single"][-1]:
        token = processor["single"][-1]["SpecialToken"]["id"]
        return int(processor["special_tokens"][token]["ids"][0])
    for i, token in added.items():
        if token["content"].strip() in ("</s>", "<eos>"):
            return i
    raise _InexpressibleError("has no end-of-sentence token")
