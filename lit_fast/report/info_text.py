"""The contents of a dataset or a run as one screen of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_fast.utils.format import format_table

_SHOWN = 3  # entries of a long list


def format_info(value: dict[str, Any]) -> str:
    """Return one screen of text for the result of `gather`."""
    pairs = _dataset_lines(value) if value["kind"] == "dataset" else _run_lines(value)
    pairs += [("missing", f"{item['what']}: {item['command']}") for item in value["todo"]]
    pairs += [("PROBLEM", problem) for problem in value["problems"]]
    return format_table(pairs, left=(0, 1))


def first_names(names: Sequence[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _dataset_lines(value: dict[str, Any]) -> list[tuple[str, str]]:
    sources, left_out = value["sources"], value["left_out"]
    captions = f"{value['captions']:,}, {value['captions_per_row']:.1f} per row"
    if value["captionless"]:
        captions += f"; rows without: {value['captionless']:,}"
    labels = "none"
    if value["labelled"]:
        labels = (
            f"rows {value['labelled']:,}, class names {value['classes']:,}, templates {value['templates']}"
        )
    state = "all present" if not sources["missing"] and not sources["changed"] else "see below"
    lines = [
        ("dataset", value["path"]),
        ("rows", f"{value['rows']:,}, shards {value['shards']:,}, order by seed {value['seed']}"),
        ("captions", captions if value["captions"] else "none"),
        ("labels", labels),
        ("sources", f"files {sources['count']:,}, {_size(sources['bytes'])}; {state}"),
    ]
    if left_out:
        lines.append(("skipped", f"{sum(left_out.values()):,}: {_counts(left_out)}"))
    lines += [line for found in value["features"] for line in _feature_lines(found)]
    for found in value["tokens"]:
        share = 100 * found["truncated"] / max(found["captions"], 1)
        text = (
            f"{found['name']}: {found['vocab_size']:,} pieces, {found['mean_length']:.1f} tokens per caption"
        )
        text += f", at most {found['max_length']} ({share:.1f} % are cut), {_size(found['bytes'])}"
        lines.append(("tokens", f"{text}, identity {found['identity'][:8]}"))
    return lines


def _feature_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    text = f"{found['name']}: {found['finished']:,} of {found['shards']:,} shards"
    text += f", {found['valid']:,} valid and {found['invalid']:,} invalid rows"
    if found["reasons"]:
        text += f" ({_counts(found['reasons'])})"
    pre = found["preprocess"]
    origin = f"computed in {found['dtype']}, {pre['method']} {pre['size']} px" if pre else "imported"
    made = f"width {found['width']}, {origin}"
    made += f", {_size(found['bytes'])}, identity {found['identity'][:8]}"
    return [("features", text), ("", "  " + made), ("", f"  {found['source']}")]


def _run_lines(value: dict[str, Any]) -> list[tuple[str, str]]:
    state = "finished" if value["finished"] else "not finished"
    tower, tokenizer, metrics = value["tower"], value["tokenizer"], value["metrics"]
    lines = [
        ("run", value["path"]),
        ("step", f"{value['step']:,} of {value['steps']:,}, {state}"),
        ("checkpoints", ", ".join(f"{step:,}" for step in value["checkpoints"]) or "none"),
        ("dataset", value["dataset"]),
    ]
    if tower:
        lines.append(("tower", f"{tower['name']}, width {tower['width']}, identity {tower['identity'][:8]}"))
    if tokenizer:
        text = f"{tokenizer['vocab_size']:,} pieces, at most {tokenizer['max_length']} tokens"
        lines.append(("tokenizer", f"{text}, identity {tokenizer['identity'][:8]}"))
    if memory := value["memory"]:
        text = f"keeps {memory['keep']}, parts {memory['parts']}; {_size(memory['bytes'])} a device of "
        lines.append(("memory", f"{text}{_size(memory['limit_bytes'])}, by {memory['bytes_by']}"))
    if metrics:
        figures = {
            k: f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float | int) and k != "step"
        }
        first = f"at step {metrics['step']:,}: {figures.pop('loss')}"
        lines += [("last metrics", first), ("", "  " + ", ".join(figures.values()))]
    for evaluation in value["evaluations"][-1:]:
        lines.append(("evaluation", f"at step {evaluation['step']:,} (of {len(value['evaluations'])})"))
        width = max(map(len, evaluation["figures"]))
        lines += [("", f"  {k:{width}} {100 * v:5.1f} %") for k, v in evaluation["figures"].items()]
    return lines


def _counts(counts: dict[str, int]) -> str:
    """Return the largest counts: `cut off 3, not an image 1`."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return first_names([f"{name} {number:,}" for name, number in ordered])


def _size(count: float) -> str:
    """Return `1.5 MB` for 1 500 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
