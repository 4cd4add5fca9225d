"""Lock, check and write the directory of a run, and load its initial parameters.

A run resumes only with its own configuration and inputs. `check_*` compare them before anything is written;
`write_workdir` records them once all checks have passed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import Mesh

from lit_fast.config import MAY_CHANGE_ON_RESUME, Config, flatten
from lit_fast.config_io import to_toml
from lit_fast.data.tokens import Tokens
from lit_fast.errors import UserError
from lit_fast.models.precision import fast_dtype
from lit_fast.models.two_towers import Params, without_image_tower
from lit_fast.runs.run import open_run, read_config
from lit_fast.runtime import broadcast_text
from lit_fast.storage.atomic import write_atomic
from lit_fast.storage.files import exists, is_directory, is_file, list_names
from lit_fast.storage.lock import Lock
from lit_fast.storage.paths import StrPath, join
from lit_fast.storage.text_files import read_json, read_object, write_json
from lit_fast.towers.trained import is_run, params_digest
from lit_fast.train.input_pipeline.stream import Stream
from lit_fast.utils.output import status
from lit_fast.weights.text_towers import read_text_weights, start_from

_TEXT_INIT = "text_init.json"


def lock_workdir(workdir: StrPath) -> Lock | None:
    """Lock the directory against other trainings.

    The first process of a training holds the lock; the others get None.

    Raises:
      UserError: another training holds the lock, or it cannot be written; in all processes.
    """
    _check_is_no_file(workdir)
    lock, problem = None, ""
    if jax.process_index() == 0:
        try:
            lock = Lock(join(workdir, ".lock"), f"workdir {workdir}", "choose another --workdir")
        except UserError as error:
            problem = str(error)
    # Without this the other processes would wait for the first one, which has stopped.
    if problem := broadcast_text(problem):
        raise UserError(problem)
    return lock


def _check_is_no_file(workdir: StrPath) -> None:
    if exists(workdir) and not is_directory(workdir):
        raise UserError(f"workdir {workdir} is a file; choose another --workdir")


def check_workdir(workdir: StrPath, config: Config) -> None:
    """Raise UserError if the directory holds anything but a run of this configuration."""
    _check_is_no_file(workdir)
    if not is_file(join(workdir, "config.toml")):
        if any(not name.startswith(".") for name in list_names(workdir)):
            raise UserError(f"workdir {workdir} is not empty and is not a run; choose another --workdir")
        return
    old, new = flatten(read_config(workdir)), flatten(config)
    for key in new:
        if old[key] != new[key] and not {key, key.partition(".")[0]} & set(MAY_CHANGE_ON_RESUME):
            raise UserError(
                f"workdir {workdir} belongs to another config: {key} is {old[key]!r} there and {new[key]!r} now; "
                "choose another --workdir or give that value"
            )


def check_identity(workdir: StrPath, name: str, identity: str) -> None:
    """Raise UserError if W/<name>.json, written at the start of the run, has another identity."""
    file = join(workdir, f"{name}.json")
    record = read_json(file) if is_file(file) else {"identity": identity}
    if not isinstance(record, dict) or "identity" not in record:
        raise UserError(f"{file} is damaged; choose another --workdir")
    if record["identity"] != identity:
        raise UserError(
            f"workdir {workdir} was started with another {name} than the dataset has now; choose another --workdir"
        )


def recorded_in_memory(workdir: StrPath) -> bool | None:
    """Return whether the run there holds its dataset in memory; None where there is no run.

    The order of the rows depends on it, so that a run keeps the choice on a machine with other memory.
    """
    file = join(workdir, "stream.json")
    return read_object(file, in_memory=bool).get("in_memory") if is_file(file) else None


def choose_dtype(config: Config, workdir: StrPath, mesh: Mesh) -> Config:
    """Replace `text.dtype = "auto"`: a run keeps its dtype, a new one takes the faster one of its devices.

    All processes take that of the first one's record, else float32 if one of them has to. With `image.dtype = "auto"`
    a trained image tower has the same.
    """
    if config.text.dtype == "auto":
        config = replace(config, text=replace(config.text, dtype=_choose_text_dtype(workdir, mesh)))
    if config.image.trained and config.image.dtype == "auto":
        config = replace(config, image=replace(config.image, dtype=config.text.dtype))
    return config


def _choose_text_dtype(workdir: StrPath, mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    fast = fast_dtype(platform)
    recorded = read_config(workdir).text.dtype if is_file(join(workdir, "config.toml")) else "auto"
    choices = ("float32", "bfloat16", "auto")
    index = int(broadcast_one_to_all(np.int32(choices.index(recorded))))
    if choices[index] == "auto":
        index = int(process_allgather(np.int32(choices.index(fast))).min())
    dtype = choices[index]
    if dtype != fast:
        status(f"text.dtype {dtype}, as the other processes or this run had it; {fast} is faster here")
    elif platform == "cpu":
        status(f"text.dtype {dtype}, the faster one on this processor")
    return dtype


def write_workdir(
    workdir: StrPath,
    config: Config,
    tower: dict[str, Any],
    tokens: Tokens,
    stream: Stream,
    text_init: dict[str, Any] | None,
) -> None:
    """Write the configuration and the records of the inputs; `tower` is the provenance of the vision tower."""
    # First, because this file makes the directory a run: after a kill the run can be resumed.
    write_atomic(join(workdir, "config.toml"), to_toml(config).encode())
    write_json(join(workdir, "tower.json"), tower)
    write_json(join(workdir, "tokens.json"), {k: v for k, v in tokens.meta.items() if k != "shard_keys"})
    record = {"identity": stream.identity, "description": stream.description, "in_memory": stream.in_memory}
    write_json(join(workdir, "stream.json"), record | {"dataset": tokens.dataset.digest})
    write_atomic(join(workdir, "tokenizer.model"), tokens.tokenizer().model)
    if text_init:
        write_json(join(workdir, _TEXT_INIT), text_init)


def load_initial_params(
    workdir: StrPath, config: Config, params: Params
) -> tuple[Params, dict[str, Any] | None]:
    """Replace random parameters with the pretrained ones of `text.init`.

    Without a source, and if the run has a checkpoint, nothing is read.

    Returns:
      The parameters, and the record of what was loaded; None: nothing.

    Raises:
      UserError: the weights cannot be read, do not fit, or are not those that this run started with.
    """
    source = config.text.init
    has_checkpoint = any(name.isdigit() for name in list_names(join(workdir, "checkpoints")))
    if not source or broadcast_one_to_all(np.int32(has_checkpoint)):  # others may not see the checkpoints
        return params, None
    if is_run(source):
        started, sha256, taken = start_from_run(source, params, config.loss.center)
    else:
        if config.loss.center and config.image.trained:
            raise UserError(
                f"loss.center needs a mean, which {source} does not have; leave it out, or set text.init to a "
                "centred run"
            )
        weights = read_text_weights(source)
        sha256 = weights.sha256
        started, taken = start_from(weights, params)
    record = join(workdir, _TEXT_INIT)
    if is_file(record) and read_object(record, "sha256")["sha256"] != sha256:
        raise UserError(
            f"workdir {workdir} was started with other weights than {source} has now; choose another --workdir"
        )
    return started, {"source": source, "sha256": sha256, "taken": taken}


def start_from_run(source: str, params: Params, center: bool) -> tuple[Params, str, str]:
    """Replace initial parameters by those of another run's last checkpoint.

    They are the text tower, temperature, bias, mean and image head; an image tower is named by `image.tower`. `center`
    is `loss.center`, which must be that of the run.

    Returns:
      The parameters, the digest of those that were replaced, and a description.

    Raises:
      UserError: the run's model differs from that of the configuration.
    """
    run = open_run(source)
    if run.config.loss.center != center:
        raise UserError(
            f"run {source} has loss.center {json.dumps(run.config.loss.center)} and this configuration has "
            f"{json.dumps(center)}; set it to that of the run"
        )
    found = jax.tree.map(np.asarray, without_image_tower(run.params))
    wanted = without_image_tower(params)
    have, want = (flatten_dict(tree, sep="/") for tree in (found, wanted))
    for name in sorted(have.keys() | want.keys()):
        shapes = [flat[name].shape if name in flat else None for flat in (have, want)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"run {source} has another model: its {name} has shape {shapes[0]}, this configuration's {shapes[1]}; "
                "copy [text] and [loss] from its config.toml"
            )
    image = {"img": params.get("img", {}) | found.get("img", {})} if "img" in params else {}
    taken = f"all parameters of step {run.step} but those of an image tower"
    return params | found | image, params_digest(found), taken


def check_initial_params(
    workdir: StrPath, source: str, start_step: int, text_init: dict[str, Any] | None
) -> None:
    """Raise UserError if all checkpoints are damaged and `source` was not read."""
    if source and not start_step and text_init is None:
        raise UserError(
            f"workdir {workdir} has no readable checkpoint; rerun the same command to start again from {source}"
        )
