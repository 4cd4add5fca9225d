"""`lit-fast verify`: check all stored bytes, and the features against the tower.

Nothing is changed without `repair`.
"""

from __future__ import annotations

from collections.abc import Iterable

from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import open_features, stored_towers
from lit_fast.data.tokens import stored_tokenizers
from lit_fast.embed.verify.features import repair_features, verify_features
from lit_fast.embed.verify.findings import Finding
from lit_fast.embed.verify.records import verify_records
from lit_fast.embed.verify.sources import verify_sources
from lit_fast.errors import UserError
from lit_fast.storage.paths import StrPath
from lit_fast.storage.text_files import write_json
from lit_fast.utils.output import result


def verify_dataset(
    path: StrPath,
    *,
    tower: str | None = None,
    sample: int = 64,
    repair: bool = False,
    out: StrPath | None = None,
) -> bool:
    """Check a dataset and print one line per finding.

    Args:
      path: the dataset.
      tower: check only the features of this tower.
      sample: rows per tower that are embedded again and compared.
      repair: embed the shards whose features are wrong again.
      out: a JSON file for the findings.

    Returns:
      Whether everything is right, after a repair.

    Raises:
      UserError: there is no dataset or no such tower, or a repair is not possible.
    """
    dataset = open_dataset(path)
    stores = [open_features(dataset, tower)] if tower else []
    findings: list[Finding] = []

    def report(found: Iterable[Finding]) -> list[Finding]:
        kept = []
        for finding in found:
            result(finding.line())
            kept.append(finding)
        return kept

    findings += report(verify_records(dataset))
    findings += report(verify_sources(dataset, sample))
    for name in [] if tower else stored_towers(dataset):
        try:
            stores.append(open_features(dataset, name))
        except UserError as error:
            remedy = "restore tower.json or embed under another --name"
            findings += report([Finding(f"features {name}", error.problem, remedy)])
    for features in stores:
        found = report(verify_features(features, range(dataset.shards), sample))
        if repair and any(f.wrong for f in found):
            found = report(repair_features(features, [f for f in found if f.wrong], sample))
        findings += found

    wrong = any(f.wrong for f in findings)
    result(_summary(dataset, [f.tower for f in stores], findings))
    if out is not None:
        write_json(
            out, {"dataset": str(path), "right": not wrong, "findings": [f.__dict__ for f in findings]}
        )
    return not wrong


def _summary(dataset: Dataset, towers: list[str], findings: list[Finding]) -> str:
    wrong, notes = sum(f.wrong for f in findings), sum(not f.wrong for f in findings)
    noted = f" ({notes} notes)" if notes else ""
    if wrong:
        parts = sorted({f.part for f in findings if f.wrong})
        return f"{dataset.path} is WRONG in {', '.join(parts)}: {wrong} findings{noted}"
    parts = [
        "index",
        "captions",
        *(f"tokens {name}" for name in stored_tokenizers(dataset)),
        *(f"features {name}" for name in towers),
    ]
    return f"{dataset.path} is right{noted}: {dataset.rows:,} rows; {', '.join(parts)}"
