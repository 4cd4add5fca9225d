"""Write the model card: summary, use, training, evaluation and limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lit_fast.errors import UserError
from lit_fast.evaluation.table import format_results
from lit_fast.inference.model import Model
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.paths import join
from lit_fast.train.evaluator import AVERAGED
from lit_fast.version import __version__
from lit_fast.weights.registry import known_towers


def write_card(directory: str, model: Model, library: str, notes: Sequence[str] = (), **values: Any) -> None:
    """Write `README.md`, with the front matter of the Hugging Face Hub.

    Args:
      directory: an existing directory.
      model: the exported model.
      library: the library that loads the files; `templates/` has a file of this name on their use.
      notes: sentences on the differences between the exported format and lit_fast.
      **values: variables of the template.

    Raises:
      UserError: the run's receipt is damaged.
    """
    try:
        training, evaluation = _training(model), _evaluation(model)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"the model's receipt.json is damaged: {type(error).__name__} {error}; delete it to export without its "
            "figures"
        ) from None
    licence = _tower_licence(model)
    environment = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template(f"{library}.md.jinja").render(
        values,
        model=model,
        version=__version__,
        front_matter=_front_matter(model, library, licence),
        licence=licence,
        probability="softmax over the texts" if model.loss.name == "softmax" else "sigmoid",
        notes=notes,
        training=training,
        evaluation=evaluation,
    )
    write_atomic(join(directory, "README.md"), card.encode())


def rounding_note(model: Model) -> str:
    """Return a note on the parts that are float32 here and were bfloat16 in the run."""
    bfloat16 = ["stores features"]
    if model.tower_json["dtype"] == "bfloat16":
        bfloat16.insert(0, "computes this vision tower")
    if model.config.dtype == "bfloat16":
        bfloat16.append("computes this text tower")
    return (
        f"All is computed in float32 here. lit_fast {' and '.join(bfloat16)} in bfloat16, which has about three "
        "digits: embeddings differ by as much, and a figure by one or two images."
    )


def _tower_licence(model: Model) -> str:
    """Return the licence of the vision tower's weights, "" if it is not known."""
    provenance = model.tower_json
    for tower in known_towers():
        if provenance["source"] == tower.name or (tower.sha256 and tower.sha256 == provenance.get("sha256")):
            return tower.licence
    return ""


def _front_matter(model: Model, library: str, licence: str) -> str:
    """Return YAML, in which strings and lists are written as in JSON."""
    entries: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["siglit", "clip", "image-text-retrieval", "contrastive"],
    }
    if licence:
        entries["license"] = licence.lower()
    source = str(model.tower_json["source"])
    if source.startswith(("hf:", "timm:")):
        entries["base_model"] = source.removeprefix("hf:").replace("timm:", "timm/").partition("@")[0]
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())
    return f"---\n{lines}---\n\n"


def _training(model: Model) -> str:
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
    return "".join(f"* {line}\n" for line in lines)


def _evaluation(model: Model) -> str:
    receipt = model.receipt
    results = [] if receipt is None else receipt["evaluation"]["results"]
    results = [r for r in results if r["dataset"].endswith(AVERAGED) == model.average]
    if not results:
        return "It was not evaluated.\n"
    if receipt is None or receipt["steps_done"] != model.step:
        return "These weights were not evaluated; the run's figures are of its last step.\n"
    return (
        "Intervals cover the choice of images; they do not cover the variation between trainings.\n\n"
        f"```\n{format_results(results)}\n```\n"
    )
