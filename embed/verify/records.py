"""Check index, captions and tokens against each other and `dataset.json`."""

from __future__ import annotations

from collections.abc import Iterator

from lit_fast.data.dataset import BLOCK, SHARD, Dataset, decode_block, decode_captions
from lit_fast.data.records import RecordReader
from lit_fast.data.tokens import Tokens, open_tokens, stored_tokenizers
from lit_fast.embed.verify.findings import Finding
from lit_fast.errors import UserError
from lit_fast.utils.progress import Progress

_DAMAGE = (UserError, ValueError, TypeError, KeyError, IndexError, AttributeError)
_REMEDY = "repeat lit-fast index, or restore the file"


def verify_records(dataset: Dataset) -> Iterator[Finding]:
    """Yield the findings on all records; each record is read once."""
    stores: list[Tokens] = []
    for name in stored_tokenizers(dataset):
        try:
            tokens = open_tokens(dataset, name)
            tokens.tokenizer()
            stores.append(tokens)
        except UserError as error:
            yield Finding(f"tokens {name}", error.problem, _tokenize_again(dataset))
    index, captions = dataset.index_reader(), dataset.captions_reader()
    token_readers = [tokens.reader() for tokens in stores]
    counted = {"rows": 0, "captions": 0, "captionless": 0, "labelled": 0}
    progress = Progress("verify records", dataset.rows, "rows")
    for b in range(dataset.blocks):
        rows, shard = min(BLOCK, dataset.rows - b * BLOCK), b * BLOCK // SHARD
        record = f"record {b} (rows {b * BLOCK:,} to {b * BLOCK + rows - 1:,})"
        counts: list[int] | None = None  # captions of each row
        try:
            counts, labelled = _check_index(dataset, index.read(b), rows)
            counted["rows"] += rows
            counted["captions"] += sum(counts)
            counted["captionless"] += counts.count(0)
            counted["labelled"] += labelled
        except _DAMAGE as error:
            yield Finding("index", f"{record}: {error}", _REMEDY, shard)
        try:
            _check_captions(captions.read(b), rows, counts)
        except _DAMAGE as error:
            yield Finding("captions", f"{record}: {error}", _REMEDY, shard)
        for tokens, reader in zip(stores, token_readers, strict=True):
            try:
                _check_tokens(tokens, reader, b, counts)
            except _DAMAGE as error:
                yield Finding(f"tokens {tokens.name}", f"{record}: {error}", _tokenize_again(dataset), shard)
        if b == dataset.blocks - 1 or (b + 1) * BLOCK % SHARD == 0:
            yield from _check_keys(dataset, shard)
        progress.advance(rows)
    progress.close()
    recorded = {name: getattr(dataset, name) for name in counted}
    if recorded["rows"] == counted["rows"] and recorded != counted:
        different = ", ".join(
            f"{name} {counted[name]:,} instead of {recorded[name]:,}"
            for name in counted
            if recorded[name] != counted[name]
        )
        yield Finding("index", f"the records have other counts than dataset.json: {different}", _REMEDY)


def _check_index(dataset: Dataset, record: bytes, rows: int) -> tuple[list[int], int]:
    """Return the number of captions of each row and the number of rows with a label."""
    block = decode_block(record)
    columns = (block.keys, block.sources, block.offsets, block.sizes, block.labels, block.captions)
    if any(len(column) != rows for column in columns):
        raise ValueError(f"it has {len(block.keys)} rows instead of {rows}")
    if not all(0 <= s < len(dataset.sources) for s in block.sources):
        raise ValueError("it names a source that dataset.json lacks")
    return [int(n) for n in block.captions], sum(label >= 0 for label in block.labels)


def _check_captions(record: bytes, rows: int, counts: list[int] | None) -> None:
    found = [len(captions) for captions in decode_captions(record)]
    if len(found) != rows or (counts is not None and found != counts):
        raise ValueError("it has other captions than the index counts")


def _check_tokens(tokens: Tokens, reader: RecordReader, b: int, counts: list[int] | None) -> None:
    found, ids = tokens.decode(reader.read(b))
    if counts is not None and found.tolist() != counts:
        raise ValueError("it has other captions than the index counts")
    if len(ids) != int(found.sum()) or (len(ids) and int(ids.max()) >= tokens.meta["vocab_size"]):
        raise ValueError("it holds ids that are not of its vocabulary")


def _check_keys(dataset: Dataset, shard: int) -> Iterator[Finding]:
    try:
        digest = dataset.prefix_digest(shard, SHARD)
    except _DAMAGE:
        return  # the unreadable record is a finding already
    if digest != dataset.shard_keys[shard]:
        yield Finding("index", "its keys are not those of dataset.json", _REMEDY, shard)


def _tokenize_again(dataset: Dataset) -> str:
    return f"tokenize again with: lit-fast tokenize {dataset.path} --tokenizer FILE.model"
