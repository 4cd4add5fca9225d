"""The contents and gaps of a dataset or a run: as plain values, and as one screen of text.

Only metadata, directory listings and metrics are read.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lit_fast.config_io import read_toml
from lit_fast.data.dataset import Dataset, open_dataset
from lit_fast.data.features import embed_command, open_features, stored_towers
from lit_fast.data.images.sources import absent_places, find_change
from lit_fast.data.tokens import open_tokens, stored_tokenizers
from lit_fast.errors import UserError
from lit_fast.runs.metrics import evaluations, read_metrics
from lit_fast.runs.remote_checkpoints import stored_steps
from lit_fast.storage.files import directory_size, exists, is_file
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_json, read_object
from lit_fast.utils.format import format_table

_SHOWN = 3  # entries of a long list


def gather(path: StrPath) -> dict[str, Any]:
    """Return the contents of a dataset or a run, ready for JSON; `kind` is "dataset" or "run".

    `todo` lists missing parts, each with the command that makes it, and `problems` lists errors. A damaged part is a
    problem and no exception, so the rest is still shown.

    Raises:
      UserError: `path` is neither, or its dataset.json or config.toml cannot be read.
    """
    if is_file(join(path, "dataset.json")):
        return _dataset(open_dataset(path))
    if is_file(join(path, "config.toml")):
        return _run(join(path))
    if not exists(path):
        raise UserError(f"{path} does not exist; give the directory of a dataset or a run")
    raise UserError(
        f"{path} is neither a dataset (no dataset.json) nor a run (no config.toml); make one with lit-fast index or "
        "lit-fast train"
    )


def _dataset(dataset: Dataset) -> dict[str, Any]:
    problems: list[str] = []
    todo: list[dict[str, str]] = []
    sources = _sources(dataset, problems)
    features = [
        _guarded(join(dataset.path, "features", name), problems, _features, dataset, name, todo, problems)
        for name in stored_towers(dataset)
    ]
    tokens = [
        _guarded(join(dataset.path, "tokens", name), problems, _tokens, dataset, name)
        for name in stored_tokenizers(dataset)
    ]
    quoted = shlex.quote(str(dataset.path))
    if not features:
        todo.append({"what": "features", "command": f"lit-fast embed {quoted} --tower FILE.npz"})
    if not tokens and dataset.captions:
        command = f"lit-fast tokenize {quoted} --tokenizer FILE.model"
        todo.append({"what": "tokens (only for training)", "command": command})
    return {
        "kind": "dataset",
        "path": str(dataset.path),
        "rows": dataset.rows,
        "shards": dataset.shards,
        "seed": dataset.seed,
        "digest": dataset.digest,
        "captions": dataset.captions,
        "captions_per_row": dataset.captions / dataset.rows if dataset.rows else 0.0,
        "captionless": dataset.captionless,
        "labelled": dataset.labelled,
        "classes": len(dataset.classnames),
        "templates": len(dataset.templates),
        "sources": sources,
        "left_out": dataset.left_out,
        "features": [f for f in features if f],
        "tokens": [t for t in tokens if t],
        "todo": todo,
        "problems": problems,
    }


def _guarded(
    path: str, problems: list[str], read: Callable[..., dict[str, Any]], *args: Any
) -> dict[str, Any] | None:
    """Return `read(*args)`; None, and append a problem, where the files below `path` are damaged."""
    try:
        return read(*args)
    except UserError as error:
        problems.append(str(error))
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f"{path} is damaged: {type(error).__name__} {error}")
    return None


def _sources(dataset: Dataset, problems: list[str]) -> dict[str, Any]:
    missing, changed = [], []
    for source in dataset.sources:
        if "://" in source.path or source.kind == "noise":
            continue  # remote files are not queried, and noise is no file
        if not exists(source.path):
            missing.append(source.path)
        elif is_file(source.path) and find_change(source):
            changed.append(source.path)
    for state, names in (("missing", missing), ("changed", changed)):
        if names:
            problems.append(
                f"{len(names)} of {len(dataset.sources)} sources {state}: {_first_names(names)}; embedding needs them"
            )
    return {
        "count": len(dataset.sources),
        "bytes": sum(source.bytes for source in dataset.sources),
        "elsewhere": absent_places(dataset.sources),
        "missing": missing,
        "changed": changed,
    }


def _features(dataset: Dataset, name: str, todo: list[dict[str, str]], problems: list[str]) -> dict[str, Any]:
    features = open_features(dataset, name)
    tower = features.provenance
    finished = features.finished()
    rows, reasons = 0, Counter[str]()
    for shard in finished:
        manifest = features.manifest(shard)
        rows += manifest.rows
        reasons.update(manifest.invalid.values())
        if manifest.keys != dataset.shard_keys[shard] or manifest.tower != features.identity:
            problems.append(f"{features.manifest_path(shard)} belongs to other rows or another tower")
    if len(finished) < dataset.shards:
        what = f"features {name}, {dataset.shards - len(finished):,} of {dataset.shards:,} shards"
        todo.append({"what": what, "command": embed_command(dataset, tower, name)})
    invalid = reasons.total()
    return {
        "name": name,
        "source": tower["source"],
        "model": f"{tower['architecture']} {tower['model']}".strip() if "model" in tower else "",
        "identity": features.identity,
        "width": features.width,
        "dtype": tower["dtype"],
        "preprocess": tower.get("preprocess"),
        "shards": dataset.shards,
        "finished": len(finished),
        "valid": rows - invalid,
        "invalid": invalid,
        "reasons": dict(reasons.most_common()),
        "bytes": directory_size(features.path),
    }


def _tokens(dataset: Dataset, name: str) -> dict[str, Any]:
    tokens = open_tokens(dataset, name)
    meta = tokens.meta
    return {
        "name": name,
        "identity": meta["identity"],
        "vocab_size": meta["vocab_size"],
        "max_length": meta["max_length"],
        "captions": meta["captions"],
        "mean_length": meta["ids"] / max(meta["captions"], 1),
        "truncated": meta["truncated"],
        "bytes": directory_size(tokens.path),
    }


def _run(path: str) -> dict[str, Any]:
    config_file, receipt = join(path, "config.toml"), join(path, "receipt.json")
    config = read_toml(config_file)
    try:
        steps, dataset = int(config["steps"]), str(config["dataset"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config_file} is damaged: {type(error).__name__} {error}; restore it") from None
    problems: list[str] = []
    file = join(path, "tower.json")
    tower = _guarded(file, problems, _selected, file, "name", "source", "identity", "width")
    file = join(path, "tokens.json")
    tokenizer = _guarded(file, problems, _selected, file, "identity", "vocab_size", "max_length")
    if not exists(dataset):
        problems.append(f"dataset {dataset} does not exist here; resuming needs it")
    memory = _guarded(receipt, problems, _memory, receipt) if is_file(receipt) else None
    lines = read_metrics(join(path, "metrics.jsonl"))
    checkpoints = stored_steps(path)
    finished = bool(checkpoints) and checkpoints[-1] >= steps
    todo = []
    if not finished:
        command = ["lit-fast", "train", config_file, "--workdir", path]
        saved = checkpoints[-1] if checkpoints else 0
        todo.append({"what": f"steps after {saved:,}", "command": shlex.join(command)})
    return {
        "kind": "run",
        "path": path,
        "steps": steps,
        "step": max([*(line["step"] for line in lines), *checkpoints], default=0),
        "finished": finished,
        "checkpoints": checkpoints,
        "dataset": dataset,
        "tower": tower,
        "tokenizer": tokenizer,
        "memory": memory,
        "metrics": next((line for line in reversed(lines) if isinstance(line.get("loss"), float)), None),
        "evaluations": evaluations(lines),
        "todo": todo,
        "problems": problems,
    }


def _memory(receipt: str) -> dict[str, Any]:
    memory = read_object(receipt, "memory", memory=dict)["memory"]
    numbers = {key: int(memory[key]) for key in ("parts", "bytes", "limit_bytes")}
    return {"keep": str(memory["keep"]), "bytes_by": str(memory["bytes_by"])} | numbers


def _selected(path: str, *keys: str) -> dict[str, Any]:
    value = read_json(path)
    return {key: value[key] for key in keys}


def format_info(value: dict[str, Any]) -> str:
    """Return one screen of text for the result of `gather`."""
    pairs = _dataset_lines(value) if value["kind"] == "dataset" else _run_lines(value)
    pairs += [("missing", f"{item['what']}: {item['command']}") for item in value["todo"]]
    pairs += [("PROBLEM", problem) for problem in value["problems"]]
    return format_table(pairs, left=(0, 1))


def _first_names(names: Sequence[str]) -> str:
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
    if sources["elsewhere"]:
        place = sources["elsewhere"][0]
        state = f"elsewhere; connect them with: lit-fast index --relocate {place}=DIRECTORY {value['path']}"
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
    source = f"{found['source']}, {found['model']}" if found["model"] else found["source"]
    return [("features", text), ("", "  " + made), ("", f"  {source}")]


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
    return _first_names([f"{name} {number:,}" for name, number in ordered])


def _size(count: float) -> str:
    """Return `1.5 MB` for 1 500 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
