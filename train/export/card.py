"""The model card: what the model is, how to use it, how it was made and how good it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lit_fast.errors import UserError
from lit_fast.evaluation.table import format_table
from lit_fast.inference.model import Model
from lit_fast.train.evaluator import AVERAGED
from lit_fast.weights.registry import known_towers

_LIMITS = """\
The model says how well an image and a text go together, and no more than its training pairs could teach it: it has
the biases of the pictures and captions it was trained on, was not tested for safety or fairness, and is not fit for
decisions about people. Figures are of the sets named here and do not carry over to others. It reads at most
{length} tokens of a text.
"""


def model_card(model: Model, use: str, notes: Sequence[str] = (), library: str = "lit_fast") -> str:
    """A `README.md` with the front matter of the Hugging Face Hub.

    Args:
      use: Markdown that says how the files are used.
      notes: sentences about what this format does differently.
      library: that loads the files.

    Raises:
      UserError: the run's receipt is damaged.
    """
    try:
        made, figures = _made(model), _figures(model)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"the model's receipt.json is damaged: {type(error).__name__} {error}; delete it to export without its "
            "figures"
        ) from None
    sections = [
        f"{_front_matter(model, library)}# {model.name}\n",
        _what(model),
        f"## Use\n\n{use}",
        *([f"## Differences\n\n{_list(notes)}"] if notes else []),
        f"## Training\n\n{made}",
        f"## Evaluation\n\n{figures}",
        f"## Limits\n\n{_LIMITS.format(length=model.tokenizer.max_length)}",
    ]
    return "\n".join(sections)


def licence(model: Model) -> str:
    """Licence of the vision tower's weights, "" if it is not known."""
    told = model.tower_json
    for tower in known_towers():
        if told["source"] == tower.name or (tower.sha256 and tower.sha256 == told.get("sha256")):
            return tower.licence
    return ""


def probability(model: Model) -> str:
    """What makes probabilities of logits [images, texts], in words; see `Model.probabilities`."""
    return "softmax over the texts" if model.loss.name == "softmax" else "sigmoid"


def rounding(model: Model) -> str:
    """A note for formats that compute in float32, in which figures of the run were not."""
    told = ["stores features"]
    if model.tower_json["dtype"] == "bfloat16":
        told.insert(0, "computes this vision tower")
    if model.config.dtype == "bfloat16":
        told.append("computes this text tower")
    return (
        f"All is computed in float32 here. lit_fast {' and '.join(told)} in bfloat16, whose numbers have about three "
        "digits: embeddings differ by so much, and a figure by a picture or two."
    )


def _front_matter(model: Model, library: str) -> str:
    """YAML; JSON's strings and lists are YAML's."""
    entries: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["siglit", "clip", "image-text-retrieval", "contrastive"],
    }
    if licence(model):
        entries["license"] = licence(model).lower()
    source = str(model.tower_json["source"])
    if source.startswith(("hf:", "timm:")):
        entries["base_model"] = source.removeprefix("hf:").replace("timm:", "timm/").partition("@")[0]
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())
    return f"---\n{lines}---\n\n"


def _what(model: Model) -> str:
    told, shape = model.tower_json, model.config.shape
    known = licence(model)
    rights = f"{known} (of the vision tower)" if known else "not known"
    return (
        "Images and texts as vectors of one space: a frozen public vision tower, and a text tower trained for it "
        f"with the {model.loss.name} loss (SigLiT, https://arxiv.org/abs/2303.15343, section 4.4).\n\n"
        + _list(
            [
                f"vision tower: {told['name']}, {model.width} features, SHA-256 of its weights "
                f"`{told.get('sha256', 'unknown')}`",
                f"licence of the vision tower: {rights}",
                f"text tower: width {shape.width}, depth {shape.depth}, {shape.heads} heads, pooling "
                f"{model.config.pooling}, {model.tokenizer.vocab_size:,} pieces, {model.tokenizer.max_length} tokens",
                f"weights: {'moving average up to ' if model.average else ''}step {model.step:,}",
            ]
        )
    )


def _made(model: Model) -> str:
    receipt = model.receipt
    if receipt is None:
        return "The run left no receipt.\n"
    hardware, digests = receipt["hardware"], receipt["digests"]
    devices = f"{hardware['devices']} x {hardware['device_kind']}"
    if hardware["device_kind"] == "cpu":
        devices = f"{hardware['host_cores']} cores of {hardware['host_cpu']}"
    lines = [
        f"steps: {receipt['steps_done']:,} of {receipt['steps']:,} ({receipt['status']})",
        f"pairs seen: {receipt['pairs_seen']:,}",
        f"time: {receipt['elapsed_seconds'] / 3600:.3g} hours, {receipt['chip_hours']:.3g} device hours",
        f"hardware: {devices}",
        f"data: digest `{digests['dataset']}`, tokens `{digests['tokens']}`, features `{digests['tower']}`",
    ]
    if "text_init" in receipt:
        lines.append(f"text tower started from weights of SHA-256 `{receipt['text_init']['sha256']}`")
    return _list(lines)


def _figures(model: Model) -> str:
    receipt = model.receipt
    results = [] if receipt is None else receipt["evaluation"]["results"]
    results = [r for r in results if r["dataset"].endswith(AVERAGED) == model.average]
    if not results:
        return "It was not evaluated.\n"
    if receipt is None or receipt["steps_done"] != model.step:
        return "These weights were not evaluated; the run's figures are of its last step.\n"
    return (
        "Intervals are over the choice of images; how far another training would land is not in them.\n\n"
        f"```\n{format_table(results)}\n```\n"
    )


def _list(lines: Sequence[str]) -> str:
    return "".join(f"* {line}\n" for line in lines)
