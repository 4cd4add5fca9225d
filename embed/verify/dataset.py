"""`lit-fast verify`: is every stored byte of a dataset right, and are its features the tower's?

Records and digests first, then the features of each tower (`lit_fast.embed.verify.features`). Nothing is changed,
unless it is asked to mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_fast.data.dataset import BLOCK, SHARD, Dataset, decode_block, decode_captions, open_dataset
from lit_fast.data.features import open_features, stored_towers
from lit_fast.data.records import RecordReader
from lit_fast.data.tokens import Tokens, open_tokens, stored_tokenizers
from lit_fast.embed.verify.features import repair_features, verify_features
from lit_fast.embed.verify.findings import Finding
from lit_fast.errors import UserError
from lit_fast.storage.files import write_json
from lit_fast.utils.progress import Progress


def verify_dataset(
    path: Path, *, tower: str | None = None, sample: int = 64, repair: bool = False, out: Path | None = None
) -> bool:
    """Check a dataset and print one line per finding; whether nothing is wrong.

    Args:
      path: of the dataset.
      tower: check the features of this one only.
      sample: rows per tower that are embedded anew and compared.
      repair: embed the shards whose features are wrong anew.
      out: a JSON file for the findings.

    Raises:
      UserError: there is no dataset or no such tower, or what is wrong cannot be mended here.
    """
    dataset = open_dataset(path)
    stores = [open_features(dataset, tower)] if tower else []
    findings: list[Finding] = []

    def keep(found: Iterable[Finding]) -> None:
        for finding in found:
            print(finding.line(), flush=True)
            findings.append(finding)

    keep(_verify_records(dataset))
    for name in [] if tower else stored_towers(dataset):
        try:
            stores.append(open_features(dataset, name))
        except UserError as error:
            remedy = "restore tower.json or embed under another --name"
            keep([Finding(f"features {name}", str(error), remedy)])
    for features in stores:
        if repair:
            before = len(findings)
            keep(verify_features(features, range(dataset.shards), sample))
            bad = [f for f in findings[before:] if f.wrong]
            if bad:
                del findings[before:]  # what the second look finds is what counts
                keep(repair_features(features, bad, sample))
        else:
            keep(verify_features(features, range(dataset.shards), sample))
    wrong = sum(f.wrong for f in findings)
    print(_summary(dataset, [f.tower for f in stores], findings))
    if out is not None:
        write_json(
            out, {"dataset": str(path), "right": not wrong, "findings": [f.__dict__ for f in findings]}
        )
    return not wrong


def _summary(dataset: Dataset, towers: list[str], findings: list[Finding]) -> str:
    wrong, notes = sum(f.wrong for f in findings), sum(not f.wrong for f in findings)
    parts = ["index", "captions"]
    parts += [f"tokens {name}" for name in stored_tokenizers(dataset)] + [
        f"features {name}" for name in towers
    ]
    noted = f" ({notes} notes)" if notes else ""
    if not wrong:
        return f"{dataset.path} is right{noted}: {dataset.rows:,} rows; {', '.join(parts)}"
    bad = sorted({f.part for f in findings if f.wrong})
    return f"{dataset.path} is WRONG in {', '.join(bad)}: {wrong} findings{noted}"


# --- index, captions and tokens


def _verify_records(dataset: Dataset) -> Iterator[Finding]:
    stores: list[Tokens] = []
    for name in stored_tokenizers(dataset):
        try:
            tokens = open_tokens(dataset, name)
            tokens.tokenizer()
            stores.append(tokens)
        except UserError as error:
            yield Finding(f"tokens {name}", str(error), _tokenize(dataset))
    anew = "make the dataset anew with lit-fast index, or restore the file"
    index, captions = dataset.index_reader(), dataset.captions_reader()
    readers = [tokens.reader() for tokens in stores]
    counted = {"rows": 0, "captions": 0, "captionless": 0, "labelled": 0}
    progress = Progress("verify records", dataset.rows, "rows")
    for b in range(dataset.blocks):
        rows, shard = min(BLOCK, dataset.rows - b * BLOCK), b * BLOCK // SHARD
        counts: list[int] | None = None
        try:
            block = decode_block(index.read(b))
            lengths = {len(c) for c in (block.keys, block.sources, block.offsets, block.sizes, block.labels)}
            if lengths | {len(block.captions)} != {rows}:
                raise ValueError(f"it has {len(block.keys)} rows instead of {rows}")
            if not all(0 <= s < len(dataset.sources) for s in block.sources):
                raise ValueError("it names a source that dataset.json lacks")
            counts = [int(n) for n in block.captions]
            counted["rows"] += rows
            counted["captions"] += sum(counts)
            counted["captionless"] += counts.count(0)
            counted["labelled"] += sum(label >= 0 for label in block.labels)
        except _DAMAGE as error:
            yield Finding("index", f"record {b} (rows {_span(b, rows)}): {error}", anew, shard)
        try:
            texts = decode_captions(captions.read(b))
            if [len(row) for row in texts] != (counts or [len(row) for row in texts]) or len(texts) != rows:
                raise ValueError("it has other captions than the index counts")
        except _DAMAGE as error:
            yield Finding("captions", f"record {b} (rows {_span(b, rows)}): {error}", anew, shard)
        for tokens, reader in zip(stores, readers, strict=True):
            try:
                _check_ids(tokens, reader, b, counts)
            except _DAMAGE as error:
                what = f"record {b} (rows {_span(b, rows)}): {error}"
                yield Finding(f"tokens {tokens.name}", what, _tokenize(dataset), shard)
        if b == dataset.blocks - 1 or (b + 1) * BLOCK % SHARD == 0:
            yield from _check_keys(dataset, shard, anew)
        progress.advance(rows)
    progress.close()
    told = {name: getattr(dataset, name) for name in counted}
    if told["rows"] == counted["rows"] and told != counted:
        other = ", ".join(f"{k} {counted[k]:,} instead of {told[k]:,}" for k in told if told[k] != counted[k])
        yield Finding("index", f"dataset.json counts otherwise than the records: {other}", anew)


_DAMAGE = (UserError, ValueError, TypeError, KeyError, IndexError, AttributeError)


def _check_keys(dataset: Dataset, shard: int, anew: str) -> Iterator[Finding]:
    try:
        digest = dataset.prefix_digest(shard, SHARD)
    except _DAMAGE:
        return  # the record that cannot be read is a finding already
    if digest != dataset.shard_keys[shard]:
        yield Finding("index", "its keys are not those of dataset.json", anew, shard)


def _check_ids(tokens: Tokens, reader: RecordReader, b: int, counts: list[int] | None) -> None:
    found, ids = tokens.decode(reader.read(b))
    if counts is not None and found.tolist() != counts:
        raise ValueError("it has other captions than the index counts")
    if len(ids) != int(found.sum()) or (len(ids) and int(ids.max()) >= tokens.meta["vocab_size"]):
        raise ValueError("it holds ids that are not of its vocabulary")


def _tokenize(dataset: Dataset) -> str:
    return f"make the tokens anew: lit-fast tokenize {dataset.path} --tokenizer FILE.model"


def _span(b: int, rows: int) -> str:
    return f"{b * BLOCK:,} to {b * BLOCK + rows - 1:,}"
