"""The parameters that a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_fast.errors import UserError
from lit_fast.files import read_object, write_json
from lit_fast.run import Params
from lit_fast.text_weights import read_text_weights, start_from

_NAME = "text_init.json"


def starting_params(run: Path, source: str, fresh: Params) -> tuple[Params, dict[str, Any] | None]:
    """Fresh parameters with the published ones of `source` in their place, and what to write down about them.

    Without `source`, or once the run has a checkpoint, the fresh ones and None; nothing is read then.

    Raises:
      UserError: they cannot be read, do not fit, or are not those that this run was begun with.
    """
    checkpoints = run / "checkpoints"
    if not source or (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        return fresh, None
    weights = read_text_weights(source)
    file = run / _NAME
    if file.is_file() and read_object(file, "sha256")["sha256"] != weights.sha256:
        raise UserError(
            f"workdir {run} was begun with other weights than {weights.path} holds now; choose another --workdir"
        )
    params, taken = start_from(weights, fresh)
    return params, {"source": source, "sha256": weights.sha256, "taken": taken}


def write_start(run: Path, begun: dict[str, Any]) -> None:
    """Write down what the run was begun with."""
    write_json(run / _NAME, begun)


def check_start(run: Path, source: str, done: int, begun: dict[str, Any] | None) -> None:
    """A run whose checkpoints all turned out to be damaged must not go on from fresh parameters.

    Raises:
      UserError: it would.
    """
    if source and not done and begun is None:
        raise UserError(
            f"no checkpoint of {run} can be read; the same command again begins anew from {source}"
        )
