"""What a run directory holds, and who may go on in it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any

import jax

from lit_fast.config import FREE, Config, flatten
from lit_fast.config_io import to_toml
from lit_fast.data.features import Features
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.models.two_towers import Params
from lit_fast.runs.run import read_config
from lit_fast.storage.files import read_json, read_object, write_atomic, write_json
from lit_fast.train.input_pipeline.stream import Stream
from lit_fast.weights.text import read_text_weights, start_from

# The parameters that a run starts from.


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


def lock_workdir(run: Path) -> IO[str]:
    """Keep other trainings out of the directory until the returned file is closed, at the latest by exit.

    Only the first process of several locks it.

    Raises:
      UserError: another process is training there.
    """
    if jax.process_index() != 0:
        return open(os.devnull)
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "a")  # noqa: SIM115  (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"workdir {run}: another process is training there; wait for it or stop it") from None
    return file


def check_workdir(run: Path, config: Config) -> None:
    """A run goes on only with its own configuration.

    Raises:
      UserError: the directory belongs to something else.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"workdir {run} is a file; choose another --workdir")
    if not (run / "config.toml").is_file():
        if run.is_dir() and any(not p.name.startswith(".") for p in run.iterdir()):
            raise UserError(f"workdir {run} is not empty and is not a run; choose another --workdir")
        return
    old, new = flatten(read_config(run)), flatten(config)
    for key in new:
        if old[key] != new[key] and not {key, key.partition(".")[0]} & set(FREE):
            raise UserError(
                f"workdir {run} belongs to another config: {key} is {old[key]!r} there and {new[key]!r} now; "
                "choose another --workdir or give that value"
            )


def check_identity(run: Path, name: str, identity: str) -> None:
    """What the run was begun with, by `name` ("tower", "tokens" or "stream"), is what there is now.

    Raises:
      UserError: it is not.
    """
    file = run / f"{name}.json"
    value = read_json(file) if file.is_file() else {"identity": identity}
    if not isinstance(value, dict) or "identity" not in value:
        raise UserError(f"{file} is damaged; choose another --workdir")
    if value["identity"] != identity:
        raise UserError(
            f"workdir {run} was begun with another {name} than the dataset has now; choose another --workdir"
        )


def write_workdir(run: Path, config: Config, features: Features, tokens: Tokens, stream: Stream) -> None:
    """Write down what the run is made of."""
    run.mkdir(parents=True, exist_ok=True)
    # First, because it makes the directory a run: a kill after it leaves something to go on with.
    write_atomic(run / "config.toml", to_toml(config).encode())
    write_json(run / "tower.json", features.provenance)
    write_json(run / "tokens.json", {k: v for k, v in tokens.meta.items() if k != "shard_keys"})
    digest = {"dataset": features.dataset.digest}
    write_json(run / "stream.json", {"identity": stream.identity, "description": stream.description} | digest)
    write_atomic(run / "tokenizer.model", tokens.tokenizer().model)
