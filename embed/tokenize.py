"""`lit-fast tokenize`: convert the captions of a dataset to token ids, once."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sentencepiece

from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.records import RecordWriter
from lit_fast.data.tokenizer import Tokenizer, load_tokenizer, lower
from lit_fast.data.tokens import encode_record
from lit_fast.embed.locks import check_rows_are_unlocked, check_tokens_are_unlocked, lock_tokens
from lit_fast.errors import UserError
from lit_fast.storage.atomic import remove_temporary_files, write_atomic
from lit_fast.storage.files import is_file, sha256
from lit_fast.storage.lock import Lock
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_json, write_json
from lit_fast.utils.output import result
from lit_fast.utils.progress import Progress
from lit_fast.weights.resolve import resolve_tokenizer

_MAX_SENTENCE = 4192  # bytes; sentencepiece's default
_MAX_SENTENCES = 2_000_000
_MAX_VOCAB = 1_000_000
_RESERVED = str.maketrans({"\0": " ", "\u2585": " "})


def tokenize_dataset(
    path: StrPath,
    *,
    tokenizer: StrPath | None = None,
    train_vocab: int | None = None,
    name: str | None = None,
    max_length: int = 16,
    pad_id: int | None = None,
    model_type: str = "unigram",
) -> None:
    """Write `D/tokens/<name>` with a given tokenizer or one trained on the captions.

    Raises:
      UserError: no captions, an unusable model, or `name` already holds other tokens.
    """
    dataset = open_dataset(path)
    if not dataset.captions:
        raise UserError(f"dataset {path} has no captions to tokenize; index captions with it")
    given: Tokenizer | None = None
    if tokenizer is not None:
        file, default_name = resolve_tokenizer(tokenizer)
        name = name or default_name
        given = load_tokenizer(file, max_length, pad_id)
    name = name or f"{model_type}-{train_vocab}"
    if "/" in name or name.startswith("."):
        raise UserError(f"{name!r} cannot be the name of a directory; give another with --name")
    directory = join(dataset.path, "tokens", name)

    def stored_model() -> Tokenizer | None:
        """Return the tokenizer that was given, or that an earlier call trained."""
        return given or _load_trained(directory, train_vocab, max_length, pad_id)

    model = stored_model()
    if model and _is_complete(dataset, model, directory):
        return
    if model is None:  # first, as nothing is written if this fails
        check_tokens_are_unlocked(directory)
        check_rows_are_unlocked(dataset)
        trained = replace(_train(dataset, train_vocab, model_type, max_length), padding=pad_id)
    with lock_tokens(directory) as lock:
        check_rows_are_unlocked(dataset)
        model = stored_model() or trained
        if _is_complete(dataset, model, directory):  # another process wrote them before this one had the lock
            return
        remove_temporary_files(directory)
        # If the dataset has grown, tokens.json has other keys until the last write; no reader takes such tokens.
        meta = _write(dataset, model, directory, lock)
    result(
        f"tokenized {meta['captions']:,} captions into {directory}: {meta['ids'] / meta['captions']:.1f} tokens "
        f"each with end-of-sentence, {meta['truncated']:,} cut at {max_length}"
    )


def _is_complete(dataset: Dataset, model: Tokenizer, directory: str) -> bool:
    """Report whether the directory has the tokens of all rows.

    Raises:
      UserError: it has those of another tokenizer.
    """
    if not is_file(join(directory, "tokens.json")):
        return False
    meta = read_json(join(directory, "tokens.json"))
    if meta["identity"] != model.identity:
        raise UserError(f"{directory} holds tokens of another tokenizer or length; choose another --name")
    if tuple(meta["shard_keys"]) != dataset.shard_keys:
        return False
    result(f"{directory} is complete: {meta['captions']:,} captions")
    return True


def _load_trained(directory: str, vocab: int | None, max_length: int, pad_id: int | None) -> Tokenizer | None:
    """Load the model that an earlier call trained; None where there is none."""
    if not is_file(join(directory, "tokens.json")):
        return None
    stored = join(directory, "tokenizer.model")
    tokenizer = load_tokenizer(stored, max_length)
    if tokenizer.vocab_size != vocab:
        raise UserError(f"{stored} has {tokenizer.vocab_size} pieces, not {vocab}; choose another --name")
    return replace(tokenizer, padding=pad_id)


def _train(dataset: Dataset, vocab: int | None, model_type: str, max_length: int) -> Tokenizer:
    """Train on the dataset's captions."""
    assert vocab is not None
    if vocab > _MAX_VOCAB:  # sentencepiece would not end
        raise UserError(f"--train-vocab {vocab} is too high; give {_MAX_VOCAB} or less")
    used = 0
    characters: set[str] = set()

    def sentences() -> Iterator[str]:
        nonlocal used
        count = 0
        for block in dataset.iter_captions():
            for caption in (c for captions in block for c in captions):
                parts = _sentences(caption)
                used += bool(parts)
                for part in parts:
                    characters.update(part)
                    yield part
                    count += 1
                    if count == _MAX_SENTENCES:
                        return

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            vocab_size=vocab,
            model_type=model_type,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,  # no caption ever becomes "unknown"
            max_sentence_length=_MAX_SENTENCE,
            input_sentence_size=_MAX_SENTENCES,
            shuffle_input_sentence=False,  # rows are shuffled already; its own sample would differ each time
            num_threads=1,  # the same model on every machine
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if not used:
            raise UserError(
                f"no caption of {dataset.path} has text, so that no tokenizer can be trained on them; give one with "
                "--tokenizer"
            ) from None
        reason = _training_problem(str(error), vocab, len(characters))
        raise UserError(
            f"no tokenizer with {vocab} pieces can be trained on the {used:,} captions of {dataset.path}: {reason}"
        ) from None
    of = "all" if used == dataset.captions else f"{used:,} of"
    result(f"trained {vocab:,} pieces on {of} {dataset.captions:,} captions")
    return Tokenizer(model.getvalue(), max_length)


def _sentences(caption: str) -> list[str]:
    """Return a caption as sentencepiece takes it: in sentences of at most 4192 bytes; [] without text.

    sentencepiece skips longer sentences, and those with the characters that it reserves. No piece spans two words.
    """
    words = lower(caption.translate(_RESERVED)).split()
    sentence = " ".join(words)
    if len(sentence) * 4 <= _MAX_SENTENCE or len(sentence.encode()) <= _MAX_SENTENCE:
        return [sentence] if words else []
    found, size = [""], 0
    for word in words:
        for start in range(0, len(word), _MAX_SENTENCE // 8):
            part = word[start : start + _MAX_SENTENCE // 8]
            length = len(part.encode()) + 1
            if size and size + length > _MAX_SENTENCE:
                found.append("")
                size = 0
            found[-1] += f" {part}" if size else part
            size += length
    return found


def _training_problem(error: str, vocab: int, characters: int) -> str:
    """Return the problem and remedy of an error of sentencepiece, whose own text names lines of its code."""
    if limit := re.search(r"set it to a value <= (\d+)", error):
        return f"they have too few different words; give --train-vocab {limit[1]} or less"
    least = re.search(r"required_chars\. \d+ vs (\d+)", error)
    if least or "required_chars" in error or vocab <= 259 + characters:
        least_text = least[1] if least else f"{259 + characters}"
        return f"3 special pieces, 256 bytes and their characters need more; give --train-vocab {least_text} or more"
    return "sentencepiece cannot use them; give another --train-vocab, or a model with --tokenizer"


def _write(dataset: Dataset, tokenizer: Tokenizer, directory: str, lock: Lock) -> dict[str, Any]:
    writer = RecordWriter(directory)
    write_atomic(join(directory, "tokenizer.model"), tokenizer.model)
    progress = Progress("tokenize", dataset.captions, "captions")
    ids = truncated = 0
    for block in dataset.iter_captions():
        lock.check()
        encoded, cut = tokenizer.encode([c for row in block for c in row])
        ids += sum(map(len, encoded))
        truncated += cut
        progress.advance(len(encoded))
        rest = iter(encoded)
        rows = [[next(rest) for _ in row] for row in block]
        writer.write(encode_record(rows, tokenizer.vocab_size))
    writer.close()
    progress.close()
    meta = {
        "identity": tokenizer.identity,
        "sha256": sha256(join(directory, "tokenizer.model")),
        "vocab_size": tokenizer.vocab_size,
        "max_length": tokenizer.max_length,
        "lower": "ascii",
        "eos": "sticky",
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "captions": dataset.captions,
        "ids": ids,
        "truncated": truncated,
        "shard_keys": list(dataset.shard_keys),
    }
    lock.check()
    write_json(join(directory, "tokens.json"), meta)
    return meta
